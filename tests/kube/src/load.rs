//! Pods under load: connections that are held open, and a stream of new ones; and what became of each.
//!
//! All times are those of `/proc/uptime`, one clock for the pods and for this program.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};

use super::{
    cluster::Cluster,
    pods::{MARKER, PORT, exec, get, request},
};

/// Echoes lines for as long as a connection lasts.
pub(super) const ECHO: u16 = 9000;

/// A connection that is held open: a line each 0.2 s, which the other end sends back.
pub(super) struct Held<'a> {
    pub(super) name: &'a str,
    pub(super) to: &'a str,
    pub(super) port: u16,
    /// The text of the lines.
    pub(super) line: &'a str,
    /// Number of such connections.
    pub(super) number: usize,
}

/// A script that echoes, and serves the marker.
pub(super) fn serve() -> String {
    let echo = echo(ECHO);
    format!("mkdir /www; echo {MARKER} >/www/index.html; {echo} & exec httpd -f -p {PORT} -h /www")
}

/// A script that echoes.
pub(super) fn echo(port: u16) -> String {
    format!("nc -ll -p {port} -e /bin/busybox cat")
}

/// Waits until a pod is answered by one that serves the marker.
pub(super) fn reaches(cluster: &Cluster, namespace: &str, from: &str, to: &str) -> Result<()> {
    cluster.eventually(&format!("{from} reaches {to}"), |cluster| {
        let answer = get(cluster, namespace, from, to, PORT)?;
        ensure!(answer.contains(MARKER), "{to} answered {answer:?}");
        Ok(())
    })
}

/// Has a pod hold connections and, when there is `web`, make a new one to it all the time.
pub(super) fn begin(
    cluster: &Cluster,
    namespace: &str,
    pod: &str,
    held: &[Held<'_>],
    web: Option<&str>,
) -> Result<()> {
    let script = format!("( {} ) </dev/null >/dev/null 2>&1 &", script(held, web));
    exec(cluster, namespace, pod, &script).map(drop)
}

fn script(held: &[Held<'_>], web: Option<&str>) -> String {
    let mut script = "mkdir -p /tmp\n".to_owned();
    for Held { name, to, port, line, number } in held {
        for index in 0..*number {
            let log = format!("/tmp/{name}.{index}");
            script += &format!(
                "( while :; do echo {line}; sleep 0.2; done | nc {to} {port} >{log}; cat /proc/uptime >{log}.ended ) &\n"
            );
        }
    }
    if let Some(web) = web {
        script += &format!(
            "( while :; do read began _ </proc/uptime; \
             if {} | nc -w 3 {web} {PORT} 2>/dev/null | grep -q {MARKER}; then how=ok; else how=failed; fi; \
             read ended _ </proc/uptime; echo $began $ended $how >>/tmp/stream; sleep 0.05; done ) &\n",
            request()
        );
    }
    script + "wait"
}

/// The state of held connections.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Ends {
    pub(super) ended: usize,
    /// Those that go on: more came back between two looks.
    pub(super) alive: usize,
}

/// Looks twice at the connections of this name.
pub(super) fn ends(cluster: &Cluster, namespace: &str, pod: &str, name: &str) -> Result<Ends> {
    let look = format!(
        "for f in /tmp/{name}.?; do if [ -e $f.ended ]; then echo ended; else wc -c <$f; fi; done; sleep 1.5; \
         for f in /tmp/{name}.?; do if [ -e $f.ended ]; then echo ended; else wc -c <$f; fi; done"
    );
    let text = exec(cluster, namespace, pod, &look)?;
    let looks: Vec<&str> = text.lines().map(str::trim).collect();
    let (before, after) = looks.split_at(looks.len() / 2);
    let mut found = Ends::default();
    for (before, after) in before.iter().zip(after) {
        match (before.parse::<u64>(), after.parse::<u64>()) {
            (_, Err(_)) => found.ended += 1,
            (Ok(before), Ok(after)) if after > before => found.alive += 1,
            _ => {}
        }
    }
    Ok(found)
}

/// New connections: when each was begun and had ended, and whether it was answered.
pub(super) struct Stream(Vec<(Duration, Duration, bool)>);

impl Stream {
    /// Those that a pod has made so far, begun at `since` or later.
    pub(super) fn of(cluster: &Cluster, namespace: &str, pod: &str, since: Duration) -> Result<Self> {
        Self::parse(&exec(cluster, namespace, pod, "cat /tmp/stream")?, since)
    }

    fn parse(text: &str, since: Duration) -> Result<Self> {
        let mut all = Vec::new();
        for line in text.lines() {
            let mut fields = line.split(' ');
            let (Some(began), Some(ended), Some(how)) = (fields.next(), fields.next(), fields.next()) else {
                // The last line may not be whole yet.
                break;
            };
            let (began, ended) =
                (Duration::from_secs_f64(began.parse()?), Duration::from_secs_f64(ended.parse()?));
            if began >= since {
                all.push((began, ended, how == "ok"));
            }
        }
        Ok(Self(all))
    }

    pub(super) fn made(&self) -> usize {
        self.0.len()
    }

    pub(super) fn failed(&self) -> usize {
        self.0.iter().filter(|(.., is_answered)| !is_answered).count()
    }

    /// From the start of the first that failed to the end of the first that was answered after the last such.
    pub(super) fn outage(&self) -> Result<Duration> {
        let failed = |(.., is_answered): &(Duration, Duration, bool)| !is_answered;
        let (Some(first), Some(last)) = (self.0.iter().position(failed), self.0.iter().rposition(failed))
        else {
            return Ok(Duration::ZERO);
        };
        let (_, again, _) = self.0.get(last + 1).context("new connections still fail")?;
        Ok(again.saturating_sub(self.0[first].0))
    }
}

/// Waits until this many more new connections were answered in a row.
pub(super) fn answered(cluster: &Cluster, namespace: &str, pod: &str, number: usize) -> Result<()> {
    let since = now()?;
    cluster.eventually("new connections are answered", |cluster| {
        let stream = Stream::of(cluster, namespace, pod, since)?;
        let last = stream.0.iter().rev().take_while(|(.., is_answered)| *is_answered).count();
        ensure!(last >= number, "{last} in a row of {}", stream.made());
        Ok(())
    })
}

/// The clock that the pods read.
pub(super) fn now() -> Result<Duration> {
    let text = fs::read_to_string("/proc/uptime").context("/proc is not mounted")?;
    let seconds = text.split(' ').next().unwrap_or_default();
    Ok(Duration::from_secs_f64(seconds.parse()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_ends_with_the_first_answer_after_it() {
        let text = "1.0 1.1 ok\n2.0 2.1 failed\n3.0 3.1 ok\n4.0 7.0 failed\n7.5 8.0 ok\n9.0 9.1 ok\n9.5";
        let all = Stream::parse(text, Duration::ZERO).expect("a stream");
        assert_eq!((all.made(), all.failed()), (6, 2));
        assert_eq!(all.outage().expect("ended"), Duration::from_secs(6));
        let late = Stream::parse(text, Duration::from_secs(9)).expect("a stream");
        assert_eq!((late.made(), late.outage().expect("none")), (1, Duration::ZERO));
        assert!(Stream::parse("1 2 failed\n", Duration::ZERO).expect("a stream").outage().is_err());
    }
}
