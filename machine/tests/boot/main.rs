//! Boots a payload from its file to a running vCPU, without devices.

mod images;
mod payload;
mod run;
