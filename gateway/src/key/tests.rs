use super::*;

const ID_ONLY: Members = Members {
    paths: Paths::new(&[&["id"], &["type"]]),
    key: &[&[0]],
    naming: 0,
    sent_id: &[0],
    event_type: &[1],
    shape: None,
};
const NESTED: Members = Members {
    paths: Paths::new(&[&["event"], &["data", "id"], &["data", "status"]]),
    key: &[&[0], &[1], &[2]],
    naming: 1,
    sent_id: &[],
    event_type: &[0],
    shape: None,
};
const NESTED_TYPE: Members = Members {
    paths: Paths::new(&[&["data", "id"], &["data", "status"], &["meta", "type"]]),
    key: &[&[0], &[1]],
    naming: 0,
    sent_id: &[],
    event_type: &[2],
    shape: None,
};
const SHAPED: Members = Members {
    paths: Paths::new(&[&["event"], &["id"], &["status"], &["Refunded"]]),
    key: &[&[0], &[1], &[2]],
    naming: 1,
    sent_id: &[],
    event_type: &[0],
    shape: Some(Shape { member: 3, event_type: "refund" }),
};

fn digest(body: &[u8]) -> [u8; 32] {
    Sha256::digest(body).into()
}

fn named(members: &Members, body: &str) -> Result<(String, String), MalformedBody> {
    identify(members, None, body.as_bytes(), || digest(body.as_bytes()))
        .map(|identity| (identity.event_id, identity.event_type))
}

/// The id is the body's digest.
fn by_digest(body: &str) -> String {
    format!("sha256:{}", hex::encode(digest(body.as_bytes())))
}

#[test]
fn ids_and_types_that_fit_are_taken_as_they_are() {
    for (body, id, event_type) in [
        (r#"{"id":"evt_1","type":"charge.succeeded"}"#, "evt_1", "charge.succeeded"),
        (" \r\n\t{ \"type\" : \"t\" , \"id\" : \"e\" } \r\n", "e", "t"),
        (r#"{"\u0069d":"evt\u005f1","type":"a\/b"}"#, "evt_1", "a/b"),
        (r#"{"id":12345678901234567890123,"type":"t"}"#, "12345678901234567890123", "t"),
        (r#"{"id":1.0,"type":7}"#, "1.0", "7"),
        (r#"{"id":-1E+2,"type":"t"}"#, "-1E+2", "t"),
        (r#"{"data":{"id":"inner","type":"inner"},"id":"e","type":"t"}"#, "e", "t"),
        (r#"{"id":"e"}"#, "e", "unknown"),
        (r#"{"id":"e","type":null}"#, "e", "unknown"),
        (r#"{"id":"e","type":""}"#, "e", "unknown"),
        (r#"{"id":"e","type":{"a":1}}"#, "e", "unknown"),
        (r#"{"id":"e","type":"a","type":"b"}"#, "e", "b"),
        (r#"{"x":1,"x":2,"id":"e","type":"t"}"#, "e", "t"),
    ] {
        assert_eq!(named(&ID_ONLY, body), Ok((id.to_owned(), event_type.to_owned())), "{body}");
    }
    let longest = format!(r#"{{"id":"{}","type":"{}"}}"#, "i".repeat(255), "t".repeat(128));
    assert_eq!(named(&ID_ONLY, &longest), Ok(("i".repeat(255), "t".repeat(128))));
}

#[test]
fn ids_that_the_contract_does_not_permit_become_the_digest_of_the_body() {
    let long = format!(r#"{{"id":"{}"}}"#, "i".repeat(256));
    for body in [
        "{}",
        r#"{"id":""}"#,
        r#"{"id":null}"#,
        r#"{"id":true}"#,
        r#"{"id":["evt_1"]}"#,
        r#"{"id":{"id":"evt_1"}}"#,
        r#"{"id":"evt 1"}"#,
        r#"{"id":"evt_\u0000"}"#,
        r#"{"id":"évt"}"#,
        r#"{"id":"evt\n"}"#,
        r#"{"id":"evt\u007f"}"#,
        r#"{"id":"\ud800"}"#,
        r#"{"id":"evt_\udc00\ud800"}"#,
        &long,
    ] {
        assert_eq!(named(&ID_ONLY, body), Ok((by_digest(body), "unknown".to_owned())), "{body}");
    }
}

#[test]
fn types_that_the_contract_does_not_permit_become_the_digest_of_their_text() {
    for event_type in ["with blank", "é", &"t".repeat(129)] {
        let body = format!(r#"{{"id":"e","type":"{event_type}"}}"#);
        let (_, canonical) = named(&ID_ONLY, &body).unwrap();
        assert_eq!(canonical, by_digest(event_type), "{event_type}");
        assert!(fits(&canonical, EVENT_TYPE_BYTES_MAX));
    }
}

#[test]
fn half_a_surrogate_is_json_and_fits_nowhere() {
    // The type is the digest of the raw text between the quotes, which keeps different types apart.
    for (json, event_type) in [
        (r#"{"id":"e","type":"\ud83d"}"#, by_digest(r"\ud83d")),
        (r#"{"id":"e","type":"a\ud83d\u0041\""}"#, by_digest(r#"a\ud83d\u0041\""#)),
        (r#"{"id":"e","type":"\ud83d\ude00"}"#, by_digest("\u{1f600}")),
    ] {
        assert_eq!(named(&ID_ONLY, json), Ok(("e".to_owned(), event_type)), "{json}");
    }
    // A member name with half a surrogate matches none of those wanted.
    for body in [r#"{"\ud83d":1,"id":"e"}"#, r#"{"id":"e","id\ud83d":"x"}"#, r#"{"id":"e","x":{"\udc00":"\ud800"}}"#] {
        assert_eq!(named(&ID_ONLY, body), Ok(("e".to_owned(), "unknown".to_owned())), "{body}");
    }
    let body = r#"{"event":"charge","data":{"\ud83d":2,"id":7,"status":"ok"}}"#;
    assert_eq!(named(&NESTED, body).unwrap().0, "charge:7:ok");
    let body = r#"{"event":"charge","data":{"id":7,"status":"\ud83d"}}"#;
    assert_eq!(named(&NESTED, body).unwrap().0, by_digest(body));
}

#[test]
fn what_is_not_one_json_object_is_malformed() {
    for body in [
        "",
        " ",
        "null",
        "[]",
        "\"evt_1\"",
        "1",
        r#"[{"id":"e"}]"#,
        "\u{feff}{\"id\":\"e\"}",
        r#"{"id":"e"}x"#,
        r#"{"id":"e"}{}"#,
        "{\"id\":\"e\"}\0",
        r#"{"id":"e""#,
        r#"{"id":"e",}"#,
        r#"{id:"e"}"#,
        r#"{'id':'e'}"#,
        r#"{"id":"e","x":01}"#,
        r#"{"id":"e","x":NaN}"#,
        r#"{"id":"e","x":"\x"}"#,
        r#"{"id":"e","x":[1,}"#,
        "{\"id\":\"e\",\"\n\":1}",
        "{\"id\":\"e\",\"\\ud800\n\":1}",
        r#"{"id":"e","\ud80":1}"#,
        r#"{"id":"e","\x":1}"#,
        "{\"id\":\"e\",\"x\":\"\n\"}",
    ] {
        assert_eq!(named(&ID_ONLY, body), Err(MalformedBody), "{body:?}");
    }
    let not_utf8 = b"{\"id\":\"e\",\"x\":\"\xff\"}";
    assert_eq!(identify(&ID_ONLY, None, not_utf8, || digest(not_utf8)), Err(MalformedBody));
}

#[test]
fn a_key_member_that_stands_twice_is_malformed() {
    for body in [r#"{"id":"a","id":"a"}"#, r#"{"id":"a","\u0069d":"b"}"#, r#"{"id":null,"id":"b"}"#] {
        assert_eq!(named(&ID_ONLY, body), Err(MalformedBody), "{body}");
    }
    for body in [
        r#"{"event":"e","data":{"id":1},"data":{"id":2}}"#,
        r#"{"event":"e","data":{"id":1,"id":2}}"#,
        r#"{"event":"e","event":"e"}"#,
    ] {
        assert_eq!(named(&NESTED, body), Err(MalformedBody), "{body}");
    }
}

#[test]
fn parts_are_joined_and_missing_ones_are_empty() {
    for (body, id) in [
        (r#"{"event":"charge","data":{"status":"ok","id":302961}}"#, "charge:302961:ok"),
        (r#"{"event":"charge","data":{"id":302961}}"#, "charge:302961:"),
        (r#"{"data":{"id":"7","more":{"id":"8"}}}"#, ":7:"),
    ] {
        assert_eq!(named(&NESTED, body).unwrap().0, id, "{body}");
    }
    // Without what tells events apart, many of them would get one name, and all but the first would be lost.
    for body in [
        "{}",
        r#"{"data":{"id":""}}"#,
        r#"{"event":"charge"}"#,
        r#"{"event":"charge","data":[1]}"#,
        r#"{"event":"charge","data":{"status":"ok"}}"#,
    ] {
        assert_eq!(named(&NESTED, body).unwrap().0, by_digest(body), "{body}");
    }
    let body = r#"{"data":{"id":"7"},"meta":{"type":"t"}}"#;
    assert_eq!(named(&NESTED_TYPE, body), Ok(("7:".to_owned(), "t".to_owned())));
}

#[test]
fn an_event_without_a_type_has_that_of_its_shape() {
    for (body, id, event_type) in [
        (r#"{"id":7,"Refunded":5,"status":"ok"}"#, "refund:7:ok", "refund"),
        (r#"{"id":7,"status":"ok"}"#, ":7:ok", "unknown"),
        (r#"{"id":7,"Refunded":null,"status":"ok"}"#, ":7:ok", "unknown"),
        (r#"{"id":7,"Refunded":5,"event":"charge","status":"ok"}"#, "charge:7:ok", "charge"),
        (r#"{"id":7,"Refunded":5,"event":"","status":"ok"}"#, "refund:7:ok", "refund"),
    ] {
        assert_eq!(named(&SHAPED, body), Ok((id.to_owned(), event_type.to_owned())), "{body}");
    }
    // It says nothing of which event it is.
    let unnamed = r#"{"Refunded":5,"status":"ok"}"#;
    assert_eq!(named(&SHAPED, unnamed), Ok((by_digest(unnamed), "refund".to_owned())));
    assert_eq!(named(&SHAPED, r#"{"id":7,"Refunded":5,"Refunded":null}"#), Err(MalformedBody));
    // What was sent is told as it was sent.
    assert_eq!(sent(&SHAPED, None, br#"{"id":7,"Refunded":5}"#).unwrap().event_type, None);
}

// T42
#[test]
fn depth_is_bounded_wherever_it_stands() {
    let nested = |levels: usize| format!(r#"{{"x":{}{},"id":"e"}}"#, "[".repeat(levels), "]".repeat(levels));
    assert_eq!(named(&ID_ONLY, &nested(DEPTH_MAX - 1)).unwrap().0, "e");
    assert_eq!(named(&ID_ONLY, &nested(DEPTH_MAX)), Err(MalformedBody));
    assert_eq!(named(&ID_ONLY, &"[".repeat(200_000)), Err(MalformedBody));
    // Brackets in strings are text.
    let text = format!(r#"{{"x":"{}\"[\\","id":"e"}}"#, "[{".repeat(500));
    assert_eq!(named(&ID_ONLY, &text).unwrap().0, "e");
    // Side by side is not deep.
    let wide = format!(r#"{{"x":[{}1],"id":"e"}}"#, "[],".repeat(1_000));
    assert_eq!(named(&ID_ONLY, &wide).unwrap().0, "e");
}
