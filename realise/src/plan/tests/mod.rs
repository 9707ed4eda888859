//! The plan against a world that is made up, and cases from the seeds.

mod cases;
mod random;
mod world;
