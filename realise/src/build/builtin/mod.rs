//! Builders that are part of the program.
