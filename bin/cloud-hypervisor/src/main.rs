//! Placeholder until the first working version.
fn main() {}
