//! Store objects on disk: where they lie, their metadata, their locks, and how they go away.
//!
//! Everything works below held directory descriptors and by names that are bytes. Nothing here
//! knows the database, and nothing decides *whether* something may be deleted.

pub mod canon;
pub mod census;
pub mod dump;
pub mod entry;
pub mod file_error;
pub mod gc_lock;
pub mod layout;
pub mod links;
pub mod lock_file;
pub mod mounts;
pub mod optimise;
pub mod path_lock;
pub mod pipe;
pub mod remove;
pub mod reserve;
pub mod restore;
pub mod sync;
pub mod temp_roots;
pub mod users;

#[cfg(test)]
mod testing;
