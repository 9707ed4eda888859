//! Store objects on disk.
