//! The balloon behind real queues, driven by a driver that is sometimes hostile.

mod config;
mod hinting;
mod hostile;
mod policy;
mod queues;
mod rig;
mod saved;
mod stats;
mod turns;
