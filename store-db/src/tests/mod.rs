//! The ledger as a whole. What one function does is tested beside it.

mod ledger;
