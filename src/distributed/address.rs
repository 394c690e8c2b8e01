//! At which of this node's addresses the others reach it.

use super::world::Address;
use crate::error::WithHint;
use anyhow::{Result, anyhow};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket};

/// The address by which this node reaches the master, if it is known at all. Sends nothing.
pub fn towards(master: &Address) -> Option<IpAddr> {
    let mut addresses = (master.host.as_str(), master.port).to_socket_addrs().ok()?;
    addresses.find_map(source_address)
}

/// Where Gloo listens on this node: at the interface that `GLOO_SOCKET_IFNAME` names, else at the address by which this
/// node reaches the master. On the master's own node that may be the loopback; then it is the one by which it reaches
/// `other_node`, if the run has another.
///
/// # Errors
/// No such interface, or no way to the master.
pub fn of_this_node(master: &Address, other_node: Option<IpAddr>) -> Result<IpAddr> {
    if let Ok(names) = std::env::var("GLOO_SOCKET_IFNAME")
        && !names.trim().is_empty()
    {
        return of_interface(&names);
    }
    let address = towards(master);
    let outward = other_node.filter(|_| address.is_none_or(|a| a.is_loopback()));
    let outward = outward.and_then(|ip| source_address(SocketAddr::new(ip, master.port)));
    outward
        .or(address)
        .ok_or_else(|| anyhow!("no address of this node leads to {master}"))
        .hint("name the network interface for Gloo in GLOO_SOCKET_IFNAME, e.g. `eth0`")
}

/// The source address of packets to `target`: a connected UDP socket knows it.
fn source_address(target: SocketAddr) -> Option<IpAddr> {
    let any = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(target).ok()?;
    socket.local_addr().ok().map(|address| address.ip())
}

/// The first address, IPv4 before IPv6, of one of the interfaces.
fn of_interface(names: &str) -> Result<IpAddr> {
    let interfaces = if_addrs::get_if_addrs()?;
    let named = |name: &str| {
        let mut found: Vec<IpAddr> =
            interfaces.iter().filter(|i| i.name == name).map(|i| i.ip()).collect();
        found.sort_by_key(|ip| ip.is_ipv6());
        found.first().copied()
    };
    let mut known: Vec<&str> = interfaces.iter().map(|i| i.name.as_str()).collect();
    known.dedup();
    names
        .split(',')
        .find_map(|name| named(name.trim()))
        .ok_or_else(|| anyhow!("GLOO_SOCKET_IFNAME=`{names}`: no such interface has an address"))
        .usage(format!("this node has {}", known.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(host: &str) -> Address {
        Address { host: host.into(), port: 29500 }
    }

    #[test]
    fn a_node_reaches_itself_by_the_loopback_and_a_name_that_is_none_by_nothing() {
        assert!(towards(&at("127.0.0.1")).unwrap().is_loopback());
        assert_eq!(towards(&at("no-such-host.invalid")), None);
        assert!(of_this_node(&at("127.0.0.1"), None).unwrap().is_loopback());
    }

    #[test]
    fn an_interface_is_found_by_name_and_an_unknown_one_lists_those_there_are() {
        assert!(of_interface("nothing0, lo").unwrap().is_loopback());
        let error = of_interface("nothing0").unwrap_err();
        assert!(error.to_string().contains("`nothing0`"));
        assert!(crate::error::hint(&error).unwrap().contains("lo"), "{error:?}");
    }
}
