//! Tests the balloon with real queues, with well-behaved and hostile drivers.

mod config;
mod device_init;
mod hinting;
mod hostile;
mod queues;
mod reporting_policy;
mod rig;
mod saved;
mod stats;
mod turns;
