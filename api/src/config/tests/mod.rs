//! Tests the configuration on the command line and on the wire.

mod parse;
mod wire;
