//! The network of a command: passt, with addresses that the guest is told beforehand, so that nobody waits for DHCP.

use std::env;
use std::fs;
use std::net::Ipv4Addr;

use super::super::cli::RunArgs;
use super::super::config::NetSpec;

/// The network of the first card; those that follow count its third byte on.
const NETWORK: [u8; 3] = [10, 0, 2];
/// Most cards that get such a network.
const MOST: usize = 250;

/// Gives a command a card when none is named, and addresses to those of passt. What the user is to know where there can be none.
pub fn fill(args: &mut RunArgs) -> Option<String> {
    let mut warning = None;
    if args.nets.is_empty() {
        warning = obstacle();
        if warning.is_none() {
            args.nets.push(NetSpec { user: true, ..NetSpec::default() });
        }
    }
    let free = |net: &&mut NetSpec| net.user && net.address.is_none() && net.gateway.is_none();
    for (net, count) in args.nets.iter_mut().filter(free).take(MOST).zip(0_u8..) {
        let [a, b, c] = NETWORK;
        let host = |last| Ipv4Addr::new(a, b, c.saturating_add(count), last);
        net.gateway = Some(host(2));
        net.dns.get_or_insert(host(3));
        net.address = Some(format!("{}/24", host(15)));
    }
    warning
}

/// Why there can be no network.
fn obstacle() -> Option<String> {
    let path = env::var_os("PATH").unwrap_or_default();
    if !env::split_paths(&path).any(|folder| folder.join("passt").is_file()) {
        return Some("the guest has no network, for passt is not installed: apt install passt (--net none: no network is wanted)".to_owned());
    }
    // passt takes what it does not know from the interface with the default route, and ends without one.
    let fourth = fs::read_to_string("/proc/net/route").unwrap_or_default();
    let sixth = fs::read_to_string("/proc/net/ipv6_route").unwrap_or_default();
    let any = routes_out(&fourth, &sixth);
    (!any).then(|| {
        "the guest has no network, for this host has no default route (--net none: no network is wanted)"
            .to_owned()
    })
}

/// Whether a table of routes has a default one that is not the loopback interface's (proc(5)).
fn routes_out(fourth: &str, sixth: &str) -> bool {
    let default = |line: &str, name: usize, zeroes: &[usize]| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let zero = |at: &usize| words.get(*at).is_some_and(|word| word.bytes().all(|byte| byte == b'0'));
        zeroes.iter().all(zero) && words.get(name).is_some_and(|name| *name != "lo")
    };
    fourth.lines().skip(1).any(|line| default(line, 0, &[1, 7]))
        || sixth.lines().any(|line| default(line, 9, &[0, 1]))
}

/// What `bulkhead-init` is told of it.
pub fn plan(args: &RunArgs) -> Vec<(&'static str, String)> {
    let host = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    plan_with(args, &host)
}

fn plan_with(args: &RunArgs, resolver: &str) -> Vec<(&'static str, String)> {
    let mut plan = Vec::new();
    let mut routed = false;
    for (index, net) in args.nets.iter().enumerate() {
        let (Some(address), Some(gateway)) = (&net.address, net.gateway) else { continue };
        let router = if routed { String::new() } else { format!(" {gateway}") };
        plan.push(("net", format!("eth{index} {address}{router}")));
        routed = true;
    }
    if let Some(dns) = args.nets.iter().find_map(|net| net.dns) {
        let kept = resolver
            .lines()
            .filter(|line| ["search", "domain", "options"].iter().any(|word| line.starts_with(word)));
        let lines = std::iter::once(format!("nameserver {dns}")).chain(kept.map(str::to_owned));
        plan.push(("resolv", lines.map(|line| line + "\n").collect()));
    }
    plan
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::supervisor::cli::{Cli, Command};

    fn args(words: &[&str]) -> RunArgs {
        match Cli::try_parse_from(["bulkhead", "run"].iter().chain(words).chain(&["--", "true"]))
            .unwrap()
            .command
        {
            Command::Run(args) => *args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn cards_of_passt_get_addresses() {
        let mut args = args(&["--net", "user", "--net", "tap=x", "--net", "user,hostfwd=tcp:1:2"]);
        assert_eq!(fill(&mut args), None);
        let plan = plan_with(&args, "nameserver 127.0.0.53\nsearch example.org\n");
        let expected = [
            ("net", "eth0 10.0.2.15/24 10.0.2.2"),
            ("net", "eth2 10.0.3.15/24"),
            ("resolv", "nameserver 10.0.2.3\nsearch example.org\n"),
        ];
        assert_eq!(plan, expected.map(|(key, value)| (key, value.to_owned())));
    }

    #[test]
    fn what_was_said_stays() {
        let mut args = args(&["--net", "user,address=192.168.7.9/16,gateway=192.168.0.1"]);
        assert_eq!(fill(&mut args), None);
        assert_eq!(plan_with(&args, ""), [("net", "eth0 192.168.7.9/16 192.168.0.1".to_owned())]);
        let mut args = self::args(&["--net", "none"]);
        assert_eq!(fill(&mut args), None);
        assert!(args.nets.len() == 1 && plan_with(&args, "").is_empty());
    }

    #[test]
    fn default_routes_are_found() {
        let head = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n";
        let line =
            |destination| format!("{head}eth0\t{destination}\t0100070A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n");
        assert!(routes_out(&line("00000000"), ""));
        assert!(!routes_out(&line("0000070A"), ""));
        let zero = "0".repeat(32);
        let sixth =
            |name| format!("{zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200       {name}\n");
        assert!(!routes_out(head, &sixth("lo")));
        assert!(routes_out(head, &sixth("eth0")));
    }
}
