//! What stores are asked and answer.

use proptest::collection::{btree_map, btree_set};
use proptest::prelude::*;
use proptest::sample::select;

use super::derivation::output_name;
use super::paths::{drv_path, store_path};
use super::texts::{drv_output, realisation};
use crate::api::{BuildResult, BuildStatus, DerivedPath, Outputs};

pub fn outputs() -> impl Strategy<Value = Outputs> {
    prop_oneof![Just(Outputs::All), btree_set(output_name(), 1..4).prop_map(Outputs::Named)]
}

pub fn derived_path() -> impl Strategy<Value = DerivedPath> {
    prop_oneof![
        store_path().prop_map(DerivedPath::Opaque),
        drv_path().prop_map(DerivedPath::Opaque),
        (drv_path(), outputs()).prop_map(|(drv, outputs)| DerivedPath::Built { drv, outputs }),
    ]
}

pub fn build_status() -> impl Strategy<Value = BuildStatus> {
    select(BuildStatus::ALL.to_vec())
}

/// Any result; the realisations fit no derivation.
pub fn build_result() -> impl Strategy<Value = BuildResult> {
    let cpu = || proptest::option::of(any::<i64>());
    let times = (any::<u64>(), any::<bool>(), any::<u64>(), any::<u64>(), cpu(), cpu());
    let outputs = btree_map(drv_output(), realisation(), 0..3);
    (build_status(), ".{0,30}", times, outputs).prop_map(|(status, error, times, built_outputs)| {
        let (times_built, is_non_deterministic, start_time_s, stop_time_s, cpu_user_us, cpu_system_us) = times;
        BuildResult {
            status,
            error,
            times_built,
            is_non_deterministic,
            start_time_s,
            stop_time_s,
            cpu_user_us,
            cpu_system_us,
            built_outputs,
        }
    })
}
