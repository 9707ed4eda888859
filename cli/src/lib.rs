//! One binary, many names: what the name it is called by means, what its words mean, and how it
//! talks to people.
//!
//! The way of a call: [`args`] makes words into a typed
//! command, [`conf`] collects settings and picks the store, the applet runs the command with a
//! [`terminal::Terminal`] to tell things to and a [`printer::Printer`] for its results, and
//! [`exit`] makes what came of it into an exit status.

pub mod args;
pub mod conf;
pub mod exit;
pub mod graphs;
pub mod interrupt;
pub mod pager;
pub mod printer;
pub mod terminal;
