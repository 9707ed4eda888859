//! Store objects on disk.

pub mod dump;
pub mod pipe;
pub mod restore;
