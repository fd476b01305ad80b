//! `spec.rs` and `python/kbit/spec.py` are two faces of one datum: what Python wrote comes back as it was, to the bit.

use kbit_model::spec::ModelSpec;
use serde_json::Value;

/// The spec of every golden model, written by `tests/test_archs.py` (which holds the file current).
const SPECS: &str = include_str!("../../../tests/golden/specs.json");

#[test]
fn json_of_every_architecture_survives() {
    let specs: Vec<Value> = serde_json::from_str(SPECS).unwrap();
    assert!(specs.len() > 24);
    for written in specs {
        let text = written.to_string();
        let spec: ModelSpec = serde_json::from_str(&text).unwrap();
        assert_eq!(serde_json::to_value(&spec).unwrap(), written);
        let again: ModelSpec =
            serde_json::from_str(&serde_json::to_string(&spec).unwrap()).unwrap();
        assert_eq!(again, spec);
    }
}

#[test]
fn a_field_that_rust_does_not_know_is_refused() {
    let specs: Vec<Value> = serde_json::from_str(SPECS).unwrap();
    for place in ["/surprise", "/layers/0/surprise"] {
        let mut spec = specs[0].clone();
        let (parent, name) = place.rsplit_once('/').unwrap();
        spec.pointer_mut(parent)
            .and_then(Value::as_object_mut)
            .unwrap()
            .insert(name.to_owned(), Value::from(1));
        let error = serde_json::from_value::<ModelSpec>(spec).unwrap_err();
        assert!(error.to_string().contains("surprise"), "{error}");
    }
}
