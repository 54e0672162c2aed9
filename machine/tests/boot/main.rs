//! From a payload file to a running vCPU, without devices.

mod images;
mod payload;
mod run;
