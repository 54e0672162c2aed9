//! Tests the balloon with real queues, with well-behaved and hostile drivers.

mod config;
mod hinting;
mod hostile;
mod policy;
mod queues;
mod rig;
mod saved;
mod stats;
mod turns;
