//! Whole-program tests: the binary as people and scripts see it.
//!
//! They show that things are wired up; what a function does is tested beside it. `interop` runs the
//! same words through a real Nix where one is installed.

#![allow(unreachable_pub, reason = "modules of one test binary")]
#![allow(clippy::print_stdout, reason = "tests say what they skip")]
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests may panic")]

mod build_kills;
mod collections;
mod crash;
mod daemon;
mod daemon_builds;
mod daemon_limits;
mod daemon_soak;
mod full_disk;
mod garbage;
mod garbage_cuts;
mod garbage_stress;
mod hashes;
mod hostile_caches;
mod house;
mod interop;
mod interop_build;
mod limits;
mod people;
mod process;
mod pushing;
mod realisations;
mod realise;
mod remote;
mod remote_builds;
mod s3;
mod secure_caches;
mod served;
mod serving;
mod ssh_substituters;
mod stress;
mod substitute;
mod tidy;
mod vectors;
mod without_store;
mod words;
