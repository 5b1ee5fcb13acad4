//! The qtest server as its users meet it: started like libqtest starts QEMU, spoken to over its sockets, and compared with
//! QEMU itself, access by access.

#![cfg(test)]

mod conversation;
mod differential;
mod peer;
mod random;
