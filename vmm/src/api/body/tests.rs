#![allow(clippy::unwrap_used)]

use api::config::{BalloonConfig, DiskConfig, NetConfig};
use api::{
    ReclaimThresholdsChange, VmBalloonHinting, VmBalloonReporting, VmConfig, VmResize,
    VmSnapshotMergeConfig, VmUpdateRateLimiter,
};
use serde_json::{Map, Value, json};

use super::*;

#[test]
fn body_unknown_keys_of_our_endpoints_are_refused_by_name() {
    let refused = |body: &str| {
        let endpoint = Endpoint::VmSetReclaimThresholds;
        let read = read::<ReclaimThresholdsChange>(endpoint, body.as_bytes());
        read.unwrap_err().to_string()
    };
    assert_eq!(refused(r#"{"delete":["zzz"]}"#), r#"unknown key "delete""#);
    assert_eq!(
        refused(r#"{"remove_alert":["zzz"]}"#),
        r#"unknown key "remove_alert" (did you mean "remove_alerts"?)"#
    );
    assert_eq!(
        refused(r#"{"policy":{"order_min":200},"x\n":1}"#),
        r#"unknown key "policy", "x\n""#
    );
    assert_eq!(
        refused(r#"{"reporting_policy":{"order_max":2}}"#),
        r#"unknown key "reporting_policy.order_max" (did you mean "order_min"?)"#
    );
    assert_eq!(refused("[]"), "the body must be a JSON object");
    assert_eq!(refused(" [[]]"), "the body must be a JSON object");
    let many: Vec<String> = (0..1000).map(|key| format!(r#""{key}":1"#)).collect();
    let named = refused(&format!("{{{}}}", many.join(",")));
    assert_eq!(named.matches(", ").count(), KEYS_NAMED_MAX - 1);
}

/// A value of this schema with every field. `root` has the definitions.
fn full(schema: &Value, root: &Value) -> Value {
    if let Some(reference) = schema["$ref"].as_str() {
        let definition = reference.trim_start_matches('#');
        return full(root.pointer(definition).unwrap(), root);
    }
    for variants in ["anyOf", "oneOf"] {
        if let Some(variants) = schema[variants].as_array() {
            let mut variants = variants.iter();
            return full(variants.find(|it| it["type"] != "null").unwrap(), root);
        }
    }
    if let Some(words) = schema["enum"].as_array() {
        return words[0].clone();
    }
    if let Some(word) = schema.get("const") {
        return word.clone();
    }
    let kinds = &schema["type"];
    let kind = kinds.as_str().or_else(|| kinds[0].as_str());
    match kind.unwrap_or_else(|| panic!("{schema}")) {
        "object" => {
            let fields = schema["properties"].as_object().into_iter().flatten();
            Value::Object(
                fields
                    .map(|(name, it)| (name.clone(), full(it, root)))
                    .collect(),
            )
        }
        "array" => json!([full(&schema["items"], root)]),
        "boolean" => json!(true),
        "integer" => json!(schema["minimum"].as_u64().unwrap_or(1)),
        _ => json!("x"),
    }
}

/// Calls `look` with a copy of `whole` for each of its objects, which has one more key there, and with its path.
fn with_one_more_key(whole: &Value, key: &str, look: &mut impl FnMut(&str, &Value)) {
    let mut paths = Vec::new();
    paths_of_objects(whole, "", &mut paths);
    for path in paths {
        let mut changed = whole.clone();
        let object = changed.pointer_mut(&path).and_then(Value::as_object_mut);
        object.unwrap().insert(key.to_owned(), json!(1));
        look(&path, &changed);
    }
}

fn paths_of_objects(value: &Value, path: &str, paths: &mut Vec<String>) {
    let parts: Map<String, Value> = match value {
        Value::Object(fields) => {
            paths.push(path.to_owned());
            fields.clone()
        }
        Value::Array(items) => (0..)
            .map(|at: usize| at.to_string())
            .zip(items.clone())
            .collect(),
        _ => return,
    };
    for (name, part) in &parts {
        paths_of_objects(part, &format!("{path}/{name}"), paths);
    }
}

/// Checks the body of one endpoint, and returns the number of its objects.
fn refuses_unknown_keys_everywhere<T: DeserializeOwned + JsonSchema>(endpoint: Endpoint) -> usize {
    let schema = schemars::schema_for!(T);
    let whole = full(schema.as_value(), schema.as_value());
    let name = endpoint.name();
    let read = |body: &Value| read::<T>(endpoint, body.to_string().as_bytes()).map(drop);
    read(&whole).unwrap_or_else(|error| panic!("{name} {whole}: {error}"));
    let mut objects = 0;
    with_one_more_key(&whole, "unheard_of", &mut |path, body| {
        let error = read(body).expect_err(&format!("{name}{path}")).to_string();
        assert!(error.contains("unheard_of"), "{name}{path}: {error}");
        objects += 1;
    });
    objects
}

#[test]
fn body_unknown_keys_of_our_endpoints_are_refused_at_every_depth() {
    macro_rules! check {
        ($($endpoint:ident: $body:ty, $objects:literal;)+) => {{
            $(
                let endpoint = Endpoint::$endpoint;
                let objects = refuses_unknown_keys_everywhere::<$body>(endpoint);
                assert_eq!(objects, $objects, "{}", endpoint.name());
            )+
            vec![$(Endpoint::$endpoint),+]
        }};
    }
    let checked = check! {
        VmUpdateRateLimiter: VmUpdateRateLimiter, 4;
        VmAddBalloon: BalloonConfig, 1;
        VmSnapshotMerge: VmSnapshotMergeConfig, 1;
        VmSetReclaimThresholds: ReclaimThresholdsChange, 3;
        VmBalloonHinting: VmBalloonHinting, 1;
        VmBalloonReporting: VmBalloonReporting, 1;
    };
    let ours = Endpoint::ALL
        .iter()
        .filter(|it| it.origin() == Origin::Ours && it.request().is_some());
    assert_eq!(ours.copied().collect::<Vec<_>>(), checked);
}

#[test]
fn body_unknown_keys_of_upstreams_endpoints_are_ignored() {
    let body = br#"{"desired_balloon":1,"desired_future":{"deep":[1,2]}}"#;
    let resize: VmResize = read(Endpoint::VmResize, body).unwrap();
    assert_eq!(resize.desired_balloon, Some(1));
}

#[test]
fn body_unknown_keys_of_upstreams_endpoints_are_logged_with_suggestions() {
    let unknown = ["disks.0.read_only", "zzz"].map(str::to_owned);
    assert_eq!(
        list::<VmConfig>(&unknown),
        r#""disks.0.read_only" (did you mean "readonly"?), "zzz""#
    );
}

#[test]
fn body_with_more_values_than_any_vm_has_is_refused_before_it_is_built() {
    for (part, count) in [("{}", CONTAINERS_MAX), ("1", VALUES_MAX)] {
        let list = vec![part; count].join(",");
        let body = format!(r#"{{"disks":[{list}],"balloon":null}}"#);
        assert!(matches!(
            read::<VmConfig>(Endpoint::VmCreate, body.as_bytes()),
            Err(BodyError::TooManyValues)
        ));
    }
    // Brackets and commas inside a string do not count.
    let text = "[{,\\\"".repeat(VALUES_MAX);
    let body = format!(r#"{{"payload":{{"kernel":"/k","cmdline":"{text}"}}}}"#);
    let config: VmConfig = read(Endpoint::VmCreate, body.as_bytes()).unwrap();
    assert!(config.payload.unwrap().cmdline.unwrap().ends_with("[{,\""));
}

#[test]
fn body_bound_keeps_every_list_below_8_mib() {
    for bytes in [size_of::<DiskConfig>(), size_of::<NetConfig>()] {
        assert!(bytes * CONTAINERS_MAX < 8 << 20, "{bytes}");
    }
}

/// As many of `item` as fit `bytes`, at most `count`.
fn items(item: &str, bytes: usize, count: usize) -> String {
    vec![item; count.min(bytes / (item.len() + 1))].join(",")
}

#[test]
fn body_of_any_shape_takes_a_bounded_amount_of_memory() {
    /// The largest body that the server accepts.
    const BODY_BYTES_MAX: usize = 4 << 20;
    /// Maximum memory that parsing uses in addition to the body.
    const READING_BYTES_MAX: usize = 8 << 20;
    let room = BODY_BYTES_MAX - 100;
    let zones = format!("[{}]", items("\"\"", room, 8000));
    let node = format!("{{\"guest_numa_id\":0,\"memory_zones\":{zones}}}");
    let cpus = format!("{{\"vcpu\":0,\"host_cpus\":[{}]}}", items("0", room, 8000));
    let affinity =
        |list: &str| format!("{{\"boot_vcpus\":1,\"max_vcpus\":1,\"affinity\":[{list}]}}");
    let mut bodies = vec![
        format!("{{\"numa\":[{}]}}", items(&node, room, 32)),
        format!("{{\"cpus\":{}}}", affinity(&items(&cpus, room, 32))),
        format!("{{\"payload\":{{\"kernel\":\"{}\"}}}}", "k".repeat(room)),
    ];
    for item in ["{}", "1", "\"\"", "\"aaaaaaa\"", "{\"a\":1}"] {
        for key in ["disks", "fs", "unknown"] {
            for count in [8192, VALUES_MAX - 2] {
                bodies.push(format!("{{\"{key}\":[{}]}}", items(item, room, count)));
            }
        }
    }
    for key in ["fs", "unknown"] {
        let members: Vec<_> = (0..VALUES_MAX - 2)
            .map(|name| format!("\"{name}\":1"))
            .collect();
        bodies.push(format!("{{\"{key}\":{{{}}}}}", members.join(",")));
    }
    let mut accepted = 0;
    for body in &bodies {
        assert!(body.len() <= BODY_BYTES_MAX);
        let (read, allocated) =
            test_alloc::record(|| read::<VmConfig>(Endpoint::VmCreate, body.as_bytes()));
        let peak = allocated.peak_bytes;
        assert!(peak <= READING_BYTES_MAX, "{peak}: {}", &body[..60]);
        accepted += usize::from(read.is_ok());
    }
    assert!(accepted >= 10, "{accepted} of {}", bodies.len());
    // The allocator is installed: it records a copy of the largest body.
    let (_, allocated) = test_alloc::record(|| bodies[2].clone());
    assert_eq!(allocated.peak_bytes, bodies[2].len());
}
