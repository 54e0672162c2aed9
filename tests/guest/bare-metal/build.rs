//! Points the linker at our script.

fn main() {
    let dir = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets the manifest directory");
    println!("cargo::rustc-link-arg=-Wl,-T,{dir}/link.ld");
    println!("cargo::rerun-if-changed=link.ld");
    println!("cargo::rerun-if-changed=src/boot.s");
}
