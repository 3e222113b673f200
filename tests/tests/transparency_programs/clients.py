"""Clients and servers of the lines of Python.

    clients.py serve ADDRESS PORT       serves until it is killed; the first line of a connection is its command
    clients.py CASE ADDRESS...          runs a case and prints what it saw

An address is HOST:PORT. IPv6 hosts have no brackets.
"""

import asyncio
import errno
import select
import socket
import struct
import sys
import time

# Delay of the second address, in seconds. Go's default is 0.3.
DELAY = 0.3
# Limit for hangs, in seconds.
HANG = 300

last_end = "none"


def parse(text):
    host, port = text.rsplit(":", 1)
    return host, int(port)


def family(host):
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def shown(error):
    name = errno.errorcode.get(getattr(error, "errno", None) or 0, "-")
    return f"{type(error).__name__} {name}"


# Servers


async def serve(host, port):
    server = await asyncio.start_server(served, host, port, backlog=1024)
    await server.serve_forever()


async def served(reader, writer):
    global last_end
    command = (await reader.readline()).decode().strip()
    peer = writer.get_extra_info("peername")
    if command == "peer":
        writer.write(f"{peer[0]} {peer[1]}\n".encode())
    elif command == "last":
        writer.write(f"{last_end}\n".encode())
    elif command == "echo":
        while line := await reader.readline():
            writer.write(line)
    elif command == "count":
        writer.write(f"{len(await reader.read())}\n".encode())
    elif command == "send":
        writer.write(b"x" * (8 << 20))
        await writer.drain()
    elif command == "reset":
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()
        return
    elif command == "watch":
        try:
            last_end = f"{len(await reader.read())} bytes"
        except OSError as error:
            last_end = shown(error)
    writer.close()


# Cases of asyncio


def resolve_to(addresses):
    """Has the name `name` resolve to these addresses."""
    loop = asyncio.get_running_loop()
    others = loop._ensure_resolved

    async def resolved(address, **options):
        if address[0] != "name":
            return await others(address, **options)
        return [(family(host), socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port)) for host, port in addresses]

    loop._ensure_resolved = resolved


async def ask(address, command, **options):
    reader, writer = await asyncio.open_connection(*address, **options)
    writer.write(f"{command}\n".encode())
    if command != "echo":
        writer.write_eof()
    answer = await reader.read()
    writer.close()
    return answer.decode().strip()


async def names(address):
    _, writer = await asyncio.open_connection(*address)
    peer, own = writer.get_extra_info("peername"), writer.get_extra_info("sockname")
    return f"peer {peer[0]}:{peer[1]} own {own[0]}, server sees {(await ask(address, 'peer')).split()[0]}"


async def eyeballs(*addresses):
    resolve_to(addresses)
    try:
        _, writer = await asyncio.open_connection("name", 1, happy_eyeballs_delay=DELAY)
        return writer.get_extra_info("peername")[0]
    except OSError as error:
        return str(error)


async def in_turn(*addresses):
    resolve_to(addresses)
    try:
        _, writer = await asyncio.open_connection("name", 1)
        return writer.get_extra_info("peername")[0]
    except OSError as error:
        return str(error)


async def refused(address):
    try:
        await asyncio.open_connection(*address)
        return "connected"
    except OSError as error:
        return f"{shown(error)} {error}"


async def limited(address):
    try:
        await asyncio.wait_for(asyncio.open_connection(*address), 1)
        return "connected"
    except asyncio.TimeoutError as error:
        return type(error).__name__


async def from_port(address, own):
    return await ask(address, "peer", local_addr=own)


async def reset(address):
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"reset\n")
    try:
        return f"{len(await reader.read())} bytes"
    except OSError as error:
        return shown(error)


async def half_closed(address):
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"count\n" + b"y" * (4 << 20))
    writer.write_eof()
    return (await reader.read()).decode().strip()


async def read_slowly(address):
    reader, writer = await asyncio.open_connection(*address, limit=1 << 16)
    writer.write(b"send\n")
    total = 0
    while data := await reader.read(1 << 16):
        total += len(data)
        await asyncio.sleep(0.001)
    return total


async def aborted(address):
    _, writer = await asyncio.open_connection(*address)
    writer.write(b"watch\n")
    await asyncio.sleep(0)
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    # The server has the command once it answers another connection.
    await ask(address, "peer")
    writer.transport.abort()
    while (end := await ask(address, "last")) == "none":
        await asyncio.sleep(0.01)
    return end


async def many(address):
    async def one():
        try:
            return "ok" if await ask(address, "peer") else "nothing"
        except OSError as error:
            return shown(error)

    ends = await asyncio.gather(*(one() for _ in range(300)))
    return ", ".join(f"{ends.count(end)} x {end}" for end in sorted(set(ends)))


async def cancelled(silent, address):
    tasks = [asyncio.create_task(asyncio.open_connection(*silent)) for _ in range(50)]
    await asyncio.sleep(0.1)
    for task in tasks:
        task.cancel()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    return f"{sum(isinstance(end, asyncio.CancelledError) for end in ends)} cancelled, then {bool(await ask(address, 'peer'))}"


async def idle(address):
    reader, writer = await asyncio.open_connection(*address)
    own = writer.get_extra_info("socket")
    own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in [(socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 2)]:
        own.setsockopt(socket.IPPROTO_TCP, option, value)
    own.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 2000)
    writer.write(b"echo\n")
    answers = []
    for text in [b"before\n", b"after\n"]:
        writer.write(text)
        answers.append((await reader.readline()).decode().strip())
        # Longer than all limits of the socket together.
        await asyncio.sleep(6 if text == b"before\n" else 0)
    return " ".join(answers)


async def file_sent(address):
    import tempfile

    with tempfile.TemporaryFile() as file:
        file.write(b"z" * (2 << 20))
        file.seek(0)
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"count\n")
        await writer.drain()
        await asyncio.get_running_loop().sendfile(writer.transport, file)
        writer.write_eof()
        return (await reader.read()).decode().strip()


# Cases of plain sockets


def nonblocking(address):
    own = socket.socket(family(address[0]))
    own.setblocking(False)
    return own, own.connect_ex(address)


def waited(address):
    """connect(), poll(), SO_ERROR, connect()."""
    own, first = nonblocking(address)
    poll = select.poll()
    poll.register(own, select.POLLIN | select.POLLOUT | select.POLLRDHUP)
    [(_, events)] = poll.poll(HANG * 1000)
    error = own.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    again = own.connect_ex(address)
    code = errno.errorcode
    return f"{code[first]}, events {events}, error {code.get(error, error)}, again {code.get(again, again)}"


def blocking(address):
    try:
        own = socket.create_connection(address, timeout=2)
        return f"connected to {own.getpeername()[0]}"
    except OSError as error:
        return shown(error)


def own_after(address):
    """The socket's own address after a connection that failed."""
    own = socket.socket(family(address[0]))
    failed = own.connect_ex(address)
    return f"{errno.errorcode[failed]}, own {own.getsockname()[0]}"


def mapped(address):
    own = socket.socket(socket.AF_INET6)
    own.connect((f"::ffff:{address[0]}", address[1]))
    return f"peer {own.getpeername()[0]} own {own.getsockname()[0]}"


def at_a_device(address):
    """Connections that are bound to a device, of which none should be accepted."""
    accepted = 0
    for _ in range(300):
        own = socket.socket()
        own.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
        accepted += own.connect_ex(address) == 0
        own.close()
    return "some accepted" if accepted else "none accepted"


def ended(address):
    """The end of a connection to a server that is killed."""
    own = socket.create_connection(address, timeout=HANG)
    own.sendall(b"text")
    try:
        return f"end {own.recv(100)!r}"
    except OSError as error:
        return shown(error)


def written_after_end(address):
    """Writes to a connection whose server has closed it."""
    own = socket.create_connection(address, timeout=HANG)
    own.sendall(b"last\n")
    while own.recv(100):
        pass
    own.sendall(b"more")
    poll = select.poll()
    poll.register(own, 0)
    [(_, events)] = poll.poll(HANG * 1000)
    ends = []
    for call in (lambda: own.send(b"more"), lambda: own.recv(1), lambda: own.send(b"more")):
        try:
            ends.append(str(call()))
        except OSError as error:
            ends.append(shown(error))
    return f"events {events}, " + ", ".join(ends)


def with_errors(address):
    """IP_RECVERR: errors of routers fail a connection at once, and say who has sent them."""
    own = socket.socket()
    own.settimeout(HANG)
    own.setsockopt(socket.IPPROTO_IP, 11, 1)
    try:
        own.connect(address)
        return "connected"
    except OSError as error:
        failed = shown(error)
    own.setblocking(False)
    try:
        _, extra, _, _ = own.recvmsg(100, 500, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)
    except OSError as error:
        return f"{failed}, no error: {shown(error)}"
    number, origin, kind, code = struct.unpack_from("IBBB", extra[0][2])
    return f"{failed}, {errno.errorcode[number]} of origin {origin}, type {kind}, code {code}"


def counted(address):
    """TCP_SYNCNT: the number of SYNs is the socket's."""
    own = socket.socket()
    own.setsockopt(socket.IPPROTO_TCP, socket.TCP_SYNCNT, 1)
    return errno.errorcode[own.connect_ex(address)]


def from_loopback(address):
    """A connection to another pod from a loopback address."""
    own = socket.socket()
    own.settimeout(2)
    own.bind(("127.0.0.1", 0))
    try:
        own.connect(address)
        return "connected"
    except OSError as error:
        return shown(error)


def at_device(address):
    """A server that is bound to a device."""
    server = socket.socket(family(address[0]))
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
    server.bind(address)
    server.listen()
    while True:
        client, peer = server.accept()
        client.sendall(f"hello {peer[0]}".encode())
        client.close()


def greeted(address):
    try:
        own = socket.create_connection(address, timeout=HANG)
        return own.recv(100).decode()
    except OSError as error:
        return shown(error)


def mute(address, *read):
    """A server that prints a line once a client has sent something, and reads it if an address follows."""
    server = socket.create_server(address)
    client, _ = server.accept()
    select.select([client], [], [])
    if read:
        client.recv(100)
    print("has data", flush=True)
    time.sleep(HANG)


def hangs_up(address):
    """The server's end, as poll() shows it."""
    own = socket.create_connection(address, timeout=HANG)
    own.sendall(b"last\n")
    poll = select.poll()
    poll.register(own, select.POLLRDHUP)
    [(_, events)] = poll.poll(HANG * 1000)
    text = own.recv(100).decode().strip() != ""
    return f"events {events}, text {text}, end {own.recv(100)!r}, peer {own.getpeername()[0]}"


def go_patiently(primary, fallback):
    return go(primary, fallback, HANG)


def go(primary, fallback, delay=DELAY):
    """Go's Dialer: the fallback begins after a delay, or as soon as the first address fails. The first one wins."""
    poll = select.poll()
    racing, errors = {}, []
    waiting = [fallback]

    def begin(address):
        own, code = nonblocking(address)
        if code not in (0, errno.EINPROGRESS):
            own.close()
            return errors.append(errno.errorcode[code])
        racing[own.fileno()] = (own, address)
        poll.register(own, select.POLLOUT)

    begin(primary)
    fallback_at = time.monotonic() + delay
    while racing or waiting:
        if waiting and (errors or time.monotonic() >= fallback_at):
            begin(waiting.pop())
            continue
        limit = max(0, fallback_at - time.monotonic()) if waiting else HANG
        for descriptor, _ in poll.poll(limit * 1000 + 1):
            own, address = racing.pop(descriptor)
            poll.unregister(descriptor)
            error = own.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error == 0:
                for other, _ in racing.values():
                    other.close()
                return f"{own.getpeername()[0]} after {errors}"
            errors.append(errno.errorcode[error])
            own.close()
    return f"failed: {errors}"


def main():
    case, *addresses = sys.argv[1:]
    if case == "serve":
        asyncio.run(serve(addresses[0], int(addresses[1])))
    run = globals()[case]
    addresses = [parse(text) for text in addresses]
    print(asyncio.run(run(*addresses)) if asyncio.iscoroutinefunction(run) else run(*addresses))


main()
