//! Runs one builder from a [`plan::Plan`], in a sandbox or without.
//!
//! The way of a build: the program is executed anew, once, as a process with one thread, the
//! *zygote*; for each build [`launch::launch`] has it fork a *launcher*, which reads the plan from a
//! memory file ([`enter`]). The launcher forks the
//! *reaper*, which is process 1 of the sandbox and sets it up; the reaper forks the *builder*.
//! What comes of it goes back over one socket ([`report`]); what the builder writes goes to a
//! pseudo-terminal.
//!
//! Why so, and not `clone` from the caller: a process with threads that clones without the C
//! library's knowledge leaves the child with locks that nobody will ever open, and a child that
//! shares memory with its parent (vfork) must not do what a sandbox needs (building, section 9).
//! In the launcher everything is allowed.
//!
//! The program that uses this crate calls [`enter::launcher_main`] before anything else when its
//! first argument is [`launch::LAUNCHER_WORD`].

pub mod descriptors;
pub mod enter;
pub mod filter;
pub mod launch;
pub mod plan;
pub mod report;
pub mod support;

mod ids;
mod kill;
mod root;
mod sys;
mod within;
mod zygote;
