//! Tells a service manager how we are. Source: the manual of `sd_notify`.

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use crate::conf::Env;

/// Sends a state, such as `READY=1`, if somebody wants to hear it. Nobody listening is no error.
pub(super) fn notify(env: &Env, state: &str) {
    let Some(path) = env.get_filled("NOTIFY_SOCKET") else { return };
    let address = match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(path),
    };
    let sent = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address));
    drop(sent);
}
