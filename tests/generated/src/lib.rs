//! A client of the VMM that progenitor has generated from our OpenAPI file, for tests.

#![allow(clippy::all, clippy::pedantic, clippy::unwrap_used, missing_docs)]

include!(concat!(env!("OUT_DIR"), "/client.rs"));
