//! Garbage collection: which paths are roots, what they keep alive, and how a collector comes to
//! terms with those who use the store meanwhile (`docs/gc-protocol.md`).

pub mod add_root;
pub mod hand_over;
pub mod live;
pub mod profiles;
pub mod roots;
pub mod runtime;
pub mod why;

#[cfg(test)]
mod testing;
