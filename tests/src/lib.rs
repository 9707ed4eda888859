//! Fixtures shared by the whole-program tests.
