//! An agent is killed between any two writes: what is a service at a node stays one, and a half-written table claims nothing.

use aya::EbpfLoader;
use tacit_abi::node_port::{self, FIRST, NodePortFacts, is_service};

use super::*;
use crate::programs::OBJECT;

const TCP: u8 = tacit_abi::protocol::TCP;
const UDP: u8 = tacit_abi::protocol::UDP;
const PORTS_SEEN: [u16; 4] = [443, 6443, 8443, FIRST];

/// An address, a port and a protocol.
type At = (IpAddr, u16, u8);

/// Content of the tables.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Tables {
    flags: u32,
    nodes: HashSet<Address>,
    services: Services,
}

impl Tables {
    /// Tables that no agent has written.
    fn never_written() -> Self {
        let services = Services { entries: HashSet::new(), ports: vec![0; PORT_WORDS as usize] };
        Self { flags: 0, nodes: HashSet::new(), services }
    }

    fn make(&mut self, write: Write) {
        match write {
            Write::Flags(flags) => self.flags = flags,
            Write::AddNode(address) => drop(self.nodes.insert(address)),
            Write::RemoveNode(address) => drop(self.nodes.remove(&address)),
            Write::AddService(key) => drop(self.services.entries.insert(key)),
            Write::RemoveService(key) => drop(self.services.entries.remove(&key)),
            Write::Ports(word, bits) => self.services.ports[word as usize] = bits,
        }
    }

    /// Reads the kernel's tables.
    fn read(tables: &NodeTables) -> Self {
        let ports = (0..PORT_WORDS).map(|word| tables.ports.get(&word, 0).expect("a word"));
        Self {
            flags: tables.flags().expect("flags"),
            nodes: tables.nodes.keys().filter_map(Result::ok).collect(),
            services: Services {
                entries: tables.services.keys().filter_map(Result::ok).collect(),
                ports: ports.collect(),
            },
        }
    }

    /// Returns the kernel side's verdict.
    fn has(&self, (ip, port, protocol): At) -> bool {
        let address = address(ip);
        is_service(self.flags, &address, port, &Facts { tables: self, address, port, protocol })
    }

    fn is_known(&self) -> bool {
        self.flags & flag::NODES_KNOWN != 0
    }
}

struct Facts<'a> {
    tables: &'a Tables,
    address: Address,
    port: u16,
    protocol: u8,
}

impl Facts<'_> {
    fn is_in_table(&self, port: u16, protocol: u8) -> bool {
        let key = ClearKey { address: self.address, port: port.into(), protocol: protocol.into() };
        self.tables.services.entries.contains(&key)
    }
}

impl NodePortFacts for Facts<'_> {
    fn is_node(&self) -> bool {
        self.tables.nodes.contains(&self.address)
    }
    fn is_listed(&self) -> bool {
        self.is_in_table(self.port, self.protocol)
    }
    fn is_anywhere(&self) -> bool {
        let (word, bit) = port_bit(self.port, self.protocol.into());
        self.tables.services.ports[word as usize] & bit != 0
    }
    fn is_balanced(&self) -> bool {
        self.is_in_table(0, 0)
    }
}

/// Writes of an agent.
#[derive(Debug, Clone)]
struct Wanted {
    nodes: Vec<IpAddr>,
    ports: NodeServicePorts,
    has_room: bool,
}

fn node(last: u8) -> IpAddr {
    IpAddr::from([192, 0, 2, last])
}

impl Wanted {
    fn new(nodes: &[u8], exact: &[(u8, u16, u8)], anywhere: &[(u16, u8)]) -> Self {
        let place = |(last, port, protocol): &(u8, u16, u8)| PlaintextDestination {
            address: SocketAddr::new(node(*last), *port),
            protocol: *protocol,
        };
        let all = nodes.iter().map(|last| node(*last));
        let ports = NodeServicePorts {
            exact: exact.iter().map(place).collect(),
            anywhere: anywhere.to_vec(),
            addresses: if anywhere.is_empty() { BTreeSet::new() } else { all.clone().collect() },
        };
        Self { nodes: all.collect(), ports, has_room: true }
    }

    /// All writes of an agent that finds `tables`.
    fn writes(&self, tables: &Tables) -> Vec<Write> {
        let nodes = self.nodes.iter().map(|ip| address(*ip)).collect();
        let mut writes = plan::nodes(tables.flags, &tables.nodes, &nodes, self.has_room);
        let mut between = tables.clone();
        writes.iter().for_each(|write| between.make(*write));
        let (services, room) = Services::of(&self.ports);
        assert!(room.is_ok());
        writes.extend(plan::services(between.flags, &between.services, &services, self.has_room));
        writes
    }

    /// Returns true if a service has the port, as the directory says.
    fn has(&self, (ip, port, protocol): At) -> bool {
        let at = PlaintextDestination { address: SocketAddr::new(ip, port), protocol };
        let is_anywhere =
            self.ports.anywhere.contains(&(port, protocol)) && self.ports.addresses.contains(&ip);
        let is_node_port = node_port::contains(port) && self.nodes.contains(&ip);
        is_node_port || self.ports.exact.contains(&at) || is_anywhere
    }
}

fn histories() -> Vec<Wanted> {
    vec![
        Wanted::new(&[], &[], &[]),
        Wanted::new(&[1, 2], &[], &[]),
        Wanted::new(&[1, 2], &[(1, 443, TCP)], &[]),
        Wanted::new(&[1, 2, 3], &[(1, 443, TCP), (2, 6443, TCP), (2, 443, UDP)], &[]),
        Wanted::new(&[1, 2], &[(1, 6443, TCP)], &[(443, TCP)]),
        Wanted::new(&[2, 3], &[(3, 443, TCP)], &[(6443, TCP), (443, UDP)]),
        Wanted { has_room: false, ..Wanted::new(&[1, 2], &[(1, 443, TCP)], &[]) },
    ]
}

fn everywhere() -> impl Iterator<Item = At> {
    let ports = || PORTS_SEEN.into_iter().flat_map(|port| [(port, TCP), (port, UDP)]);
    (1..=4).flat_map(move |last| ports().map(move |(port, protocol)| (node(last), port, protocol)))
}

/// Checks what the kernel has while, or after, agents have written what `begun` names.
fn assert_sound(tables: &Tables, begun: &[&Wanted]) {
    for at in everywhere() {
        let (ip, port, _) = at;
        let is_service = begun.iter().all(|wanted| wanted.has(at));
        // Before the nodes are known, node ports count at every address, and other ports are nowhere known.
        let is_due = if tables.is_known() { is_service } else { node_port::contains(port) };
        assert!(tables.has(at) || !is_due, "{at:?} is no service: {tables:?}, {begun:?}");
        let is_node_of_all = begun.iter().all(|wanted| wanted.nodes.contains(&ip));
        let is_unknown = tables.flags & flag::PORTS_UNKNOWN != 0;
        assert!(tables.has(at) || !(is_unknown && is_node_of_all), "{at:?} of unknown ports: {tables:?}");
    }
}

/// Returns the tables after each part of the writes, from none to all.
fn parts(before: &Tables, writes: &[Write]) -> Vec<Tables> {
    let mut now = before.clone();
    let after = writes.iter().map(|write| {
        now.make(*write);
        now.clone()
    });
    [before.clone()].into_iter().chain(after.collect::<Vec<_>>()).collect()
}

#[test]
fn an_agent_killed_between_any_two_writes_leaves_no_service_out() {
    let all = histories();
    for first in &all {
        let never = Tables::never_written();
        let written = first.writes(&never);
        for (count, killed) in parts(&never, &written).iter().enumerate() {
            assert_sound(killed, &[first]);
            let is_complete = count == written.len();
            // Ports count as known only after the last of them.
            let claims = flag::NODES_KNOWN | flag::PORTS_UNKNOWN;
            let claims_all = killed.flags & claims == flag::NODES_KNOWN;
            assert!(!claims_all || is_complete, "{count} of {written:?}: {killed:?}");
            for second in &all {
                let writes = second.writes(killed);
                let each = parts(killed, &writes);
                each.iter().for_each(|tables| assert_sound(tables, &[first, second]));
                let last = each.last().expect("the first is what was there");
                assert_sound(last, &[second]);
                if second.has_room {
                    for at in everywhere() {
                        assert_eq!(last.has(at), second.has(at), "{at:?} after {writes:?}");
                    }
                }
            }
        }
    }
}

/// The same with the kernel's tables: a successor finds what was written up to the kill, and completes it.
#[test]
#[ignore = "needs root"]
fn the_kernels_tables_hold_what_an_agent_wrote_until_it_was_killed() {
    let (first, second) = (&histories()[4], &histories()[5]);
    let writes = first.writes(&Tables::never_written());
    for count in 0..=writes.len() {
        // The maps are those of the programs, without the programs.
        let mut ebpf = EbpfLoader::new().load(OBJECT).expect("maps");
        let mut tables = NodeTables::take(&mut ebpf).expect("the tables");
        tables.make(&writes[..count]).expect("written");
        let killed = Tables::read(&tables);
        assert_eq!(killed, parts(&Tables::never_written(), &writes)[count]);
        assert_sound(&killed, &[first]);
        let nodes = second.nodes.iter().map(|ip| address(*ip)).collect();
        tables.set_nodes(&nodes, true).expect("written");
        assert_sound(&Tables::read(&tables), &[first, second]);
        tables.set_services(&Services::of(&second.ports).0, true).expect("written");
        let complete = Tables::read(&tables);
        for at in everywhere() {
            assert_eq!(complete.has(at), second.has(at), "{at:?} after {count} writes");
        }
        // What the kernel rejects makes every port of a node one of a service.
        let too_many = (0..=limits::NODE_SERVICE_ENTRIES).map(|port| ClearKey {
            address: address(node(2)),
            port,
            protocol: TCP.into(),
        });
        let mut rejected = Services::of(&second.ports).0;
        rejected.entries = too_many.collect();
        if count == 0 {
            tables.set_services(&rejected, true).expect_err("more than the map holds");
            let after = Tables::read(&tables);
            assert!(everywhere().filter(|(ip, ..)| second.nodes.contains(ip)).all(|at| after.has(at)));
        }
    }
}

#[test]
fn entries_that_do_not_fit_are_an_error_and_repeated_ones_are_not() {
    let fit = |keys: &[u8]| fitting(keys.iter().copied(), 2, "TEST");
    for keys in [&[][..], &[1], &[1, 2], &[1, 2, 1, 2]] {
        let (kept, room) = fit(keys);
        assert!(room.is_ok() && keys.iter().all(|key| kept.contains(key)), "{keys:?}");
    }
    let (kept, room) = fit(&[1, 1, 2, 3, 2, 4]);
    assert_eq!(kept, HashSet::from([1, 2]));
    assert!(matches!(room, Err(KernelError::Full { bound: 2, left_out: 2, .. })));
}
