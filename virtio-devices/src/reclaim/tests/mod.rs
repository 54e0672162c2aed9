//! Tests of the discard engine and the residency probe, on a model and on real mappings.

mod engine;
mod huge;
mod plan;
mod residency;
mod switch;
