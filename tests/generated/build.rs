//! Generates the client from the OpenAPI file.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::{env, fs};

use openapiv3::{OpenAPI, StatusCode};

const OPENAPI: &str = "../../api/openapi/cloud-hypervisor.yaml";

fn main() {
    println!("cargo::rerun-if-changed={OPENAPI}");
    let text = fs::read_to_string(OPENAPI).unwrap();
    let mut document: OpenAPI = serde_norway::from_str(&text).unwrap();
    leave_out_second_successes(&mut document);
    let client = progenitor::Generator::default().generate_tokens(&document);
    let file = Path::new(&env::var_os("OUT_DIR").unwrap()).join("client.rs");
    fs::write(file, client.unwrap().to_string()).unwrap();
}

/// Progenitor allows one kind of success for each operation. The endpoints that add a device have two, as upstream's:
/// 200 with the device's address if the VM runs, and 204 if it does not.
fn leave_out_second_successes(document: &mut OpenAPI) {
    for (_, path) in &mut document.paths.paths {
        let openapiv3::ReferenceOr::Item(path) = path else {
            continue;
        };
        for operation in [&mut path.get, &mut path.put].into_iter().flatten() {
            let responses = &mut operation.responses.responses;
            if responses.contains_key(&StatusCode::Code(200)) {
                responses.shift_remove(&StatusCode::Code(204));
            }
        }
    }
}
