//! Garbage collection: which paths are roots, and what they keep alive.

pub mod add_root;
pub mod roots;
pub mod runtime;

#[cfg(test)]
mod testing;
