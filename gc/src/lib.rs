//! Garbage collection: which paths are roots, and what they keep alive.
