//! Tests of the option syntax.

#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;
use crate::config::{CpusConfig, DiskConfig, NetConfig, PathOrFd};
use crate::error_chain;

const KEYS: &[&str] = &["size", "shared", "cmdline", "list", "map"];
const FLAGS: &[&str] = &["tty", "off"];

fn parse(text: &str) -> Result<Options, OptionError> {
    let mut keys = Keys::default().and(KEYS);
    keys.alternatives(FLAGS);
    Options::parse("test", text, keys)
}

fn fault(text: &str) -> OptionFault {
    parse(text).unwrap_err().fault
}

#[test]
fn options_plain_settings_are_found_by_key() {
    let options = parse("size=128M,shared=on").unwrap();
    assert_eq!(options.read("size", parse_bytes).unwrap(), Some(128 << 20));
    assert_eq!(options.get::<bool>("shared").unwrap(), Some(true));
    assert_eq!(options.text("cmdline"), None);
}

#[test]
fn options_empty_text_and_empty_value_are_unset() {
    assert_eq!(parse("").unwrap().text("size"), None);
    assert_eq!(parse("  ").unwrap().text("size"), None);
    let options = parse("size=,shared=").unwrap();
    assert_eq!(options.read("size", parse_bytes).unwrap(), None);
    assert_eq!(options.get::<bool>("shared").unwrap(), None);
}

#[test]
fn options_quotes_protect_commas_and_brackets() {
    let options = parse(r#"cmdline="console=ttyS0,115200 a[0",size=1"#).unwrap();
    assert_eq!(options.text("cmdline"), Some("console=ttyS0,115200 a[0"));
    assert_eq!(options.read("size", parse_bytes).unwrap(), Some(1));
}

#[test]
fn options_key_given_twice_counts_last() {
    assert_eq!(
        parse("size=1,size=2")
            .unwrap()
            .read("size", parse_bytes)
            .unwrap(),
        Some(2)
    );
}

#[test]
fn options_flags_are_bare_words() {
    let options = parse("tty,size=1").unwrap();
    assert!(options.flag("tty") && !options.flag("off"));
    assert!(matches!(
        fault("tty=on"),
        OptionFault::UnexpectedValue { .. }
    ));
    assert!(matches!(fault("size"), OptionFault::MissingValue { .. }));
}

#[test]
fn options_unknown_key_names_itself_and_the_known_ones() {
    let error = parse("size=1,shred=on").unwrap_err();
    assert_eq!(
        error_chain(&error),
        [
            "Error parsing --test",
            "unknown parameter \"shred\" (did you mean \"shared\"?); known are size, shared, cmdline, list, map, tty, off"
        ]
    );
}

#[test]
fn options_unknown_key_unlike_any_other_has_no_suggestion() {
    assert_eq!(
        fault("xyzzy=1").to_string(),
        "unknown parameter \"xyzzy\"; known are size, shared, cmdline, list, map, tty, off"
    );
}

#[test]
fn options_malformed_text_is_refused() {
    for text in [
        "list=[",
        "list=]",
        "list=[[1]",
        "cmdline=\"",
        "size=1,,shared=on",
        ",",
        "=1",
        " size=1, shared=on",
    ] {
        assert!(parse(text).is_err(), "{text}");
    }
    assert!(matches!(
        fault(&format!("cmdline={}", "x".repeat(OPTION_LENGTH_MAX))),
        OptionFault::TooLong { .. }
    ));
}

#[test]
fn options_bad_value_tells_key_value_and_reason() {
    let error = parse("size=12Q")
        .unwrap()
        .read("size", parse_bytes)
        .unwrap_err();
    assert_eq!(
        error_chain(&error),
        [
            "Error parsing --test",
            "invalid value \"12Q\" for parameter \"size\"",
            "\"12Q\" is not a size; use a number of bytes, or one with the unit K, M, G, T, KiB, MiB, GiB or TiB, such as \
             512M or 1.5GiB"
        ]
    );
}

#[test]
fn value_that_is_not_one_of_the_words_or_numbers_is_rejected_with_the_accepted_ones() {
    for (error, expected) in [
        (
            DiskConfig::parse("path=/a,image_type=qcow").map(drop),
            "\"qcow\" is not one of vmdk, vhd, qcow2, raw, vhdx (did you mean \"qcow2\"?)",
        ),
        (
            CpusConfig::parse("boot=1,features=amxx").map(drop),
            "\"amxx\" is not one of amx (did you mean \"amx\"?)",
        ),
        (
            NetConfig::parse("mtu=1k").map(drop),
            "\"1k\" is not a whole number from 0 to 65535",
        ),
        (
            PathOrFd::parse_api_socket("pth=/x").map(drop),
            "unknown parameter \"pth\" (did you mean \"path\"?); known are path, fd",
        ),
    ] {
        let chain = error_chain(&error.unwrap_err());
        assert_eq!(chain.last().unwrap(), expected, "{chain:?}");
    }
    let path = PathOrFd::parse_api_socket("/run/x=y").unwrap();
    assert_eq!(path, PathOrFd::Path("/run/x=y".into()));
}

#[test]
fn toggle_accepts_four_words_in_any_case() {
    assert_eq!(parse_toggle("ON"), Ok(true));
    assert_eq!(parse_toggle("True"), Ok(true));
    assert_eq!(parse_toggle("off"), Ok(false));
    for text in ["1", "yes", "enabled", ""] {
        assert!(parse_toggle(text).is_err(), "{text}");
    }
}

#[test]
fn integers_single_values_ranges_and_bare_numbers_expand() {
    let read = |text: &str| value::parse_integers::<u32>(text);
    assert_eq!(read("[0,2-4]"), Ok(vec![0, 2, 3, 4]));
    assert_eq!(read("7"), Ok(vec![7]));
    assert_eq!(read("[3-3]"), Ok(vec![3]));
    for text in [
        "[]",
        "[1-]",
        "[-1]",
        "[1-2-3]",
        "[a]",
        "[4294967296]",
        "[1,,2]",
        "[[1]]",
    ] {
        assert!(read(text).is_err(), "{text}");
    }
    assert_eq!(
        read("[4-2]"),
        Err(ValueError::RangeBackwards("4-2".to_owned()))
    );
    assert_eq!(
        value::parse_integers::<u64>("[0-18446744073709551615]"),
        Err(ValueError::ListTooLong)
    );
    assert_eq!(
        read(&format!("[0-{INTEGER_LIST_MAX}]")),
        Err(ValueError::ListTooLong)
    );
    assert_eq!(
        read(&format!("[0-{}]", INTEGER_LIST_MAX - 1))
            .unwrap()
            .len(),
        INTEGER_LIST_MAX
    );
}

#[test]
fn integer_map_nested_lists_expand() {
    let options = parse("map=[0@[1,2],1@[3-5],2@7]").unwrap();
    let map = options
        .read("map", parse_integer_map::<u32, usize>)
        .unwrap()
        .unwrap();
    assert_eq!(map, [(0, vec![1, 2]), (1, vec![3, 4, 5]), (2, vec![7])]);
    for text in [
        "map=[0]",
        "map=[@[1]]",
        "map=[0@]",
        "map=[0@[1]@2]",
        "map=[300@[1]]",
    ] {
        assert!(
            parse(text)
                .unwrap()
                .read("map", parse_integer_map::<u8, usize>)
                .is_err(),
            "{text}"
        );
    }
}

proptest! {
    #[test]
    fn options_any_text_never_panics(text in ".{0,200}") {
        // Only checks that parsing does not panic; any result is valid.
        if let Ok(options) = parse(&text) {
            drop(options.read("size", parse_bytes));
            drop(options.get::<bool>("shared"));
            drop(options.get::<Vec<u8>>("list"));
            drop(options.read("map", parse_integer_map::<u8, u16>));
            drop(options.get::<Vec<String>>("cmdline"));
        }
    }

    #[test]
    fn options_syntax_like_text_never_panics(text in "((size|shared|list|map|cmdline|tty)(=[\\[\\]0-9@,KMGT\"-]{0,12})?,?){0,6}") {
        if let Ok(options) = parse(&text) {
            drop(options.read("size", parse_bytes));
            drop(options.get::<Vec<u64>>("list"));
            drop(options.read("map", parse_integer_map::<u64, u64>));
        }
    }

    #[test]
    fn options_quoted_value_round_trips(value in "[^\"]{0,60}", size in any::<u32>()) {
        let options = parse(&format!("cmdline=\"{value}\",size={size}")).unwrap();
        prop_assert_eq!(options.text("cmdline").unwrap_or(""), value.trim());
        prop_assert_eq!(options.read("size", parse_bytes).unwrap(), Some(u64::from(size)));
    }

    #[test]
    fn bytes_any_number_round_trips(number in any::<u64>()) {
        prop_assert_eq!(parse_bytes(&number.to_string()), Ok(number));
    }
}
