//! Tests of the generic decoding; what the files of Tacit mean is tested with them.

use super::{mistakes::MISTAKES_MAX, *};

/// Decodes `name` (text), `tags` (list of text) and `port` (one of two words), as a file of Tacit would.
fn read_sample(text: &str) -> Result<String, Mistakes> {
    decode(text, Path::new("sample.yaml"), |root| {
        let mut fields = root.fields(&["name", "tags", "mode"])?;
        let name = fields.required("name", "a name").and_then(|value| value.text().map(str::to_owned));
        for tag in fields.optional("tags").and_then(|value| value.items()).unwrap_or_default() {
            tag.name();
        }
        if let Some(mode) = fields.optional("mode") {
            mode.choice(&[("STRICT", 1), ("DISABLE", 2)]);
        }
        name
    })
}

fn problems(text: &str) -> Vec<String> {
    read_sample(text).expect_err(text).list.iter().map(ToString::to_string).collect()
}

#[test]
fn every_mistake_is_reported_with_line_and_path() {
    let text = "nmae: web\ntags:\n- ok\n- Not_Ok\n- 5\nmode: strict\ntags: []\n";
    assert_eq!(
        problems(text),
        [
            "line 1: nmae: unknown field: did you mean `name`?",
            "line 1: name: missing: write a name",
            "line 4: tags[1]: \"Not_Ok\" is no Kubernetes name: write 1 to 253 characters of a-z, 0-9, '-' and '.', \
             beginning and ending with a letter or digit",
            "line 5: tags[2]: 5 is a number where text is expected: write \"5\"",
            "line 6: mode: \"strict\" is none of STRICT, DISABLE: did you mean STRICT?",
            "line 7: tags: written twice, first in line 2: keep one of them",
        ]
    );
}

#[test]
fn a_syntax_error_at_the_end_names_the_last_line() {
    for (text, line) in [
        ("name: [", 1),
        ("name: [\n", 1),
        ("name: a\ntags: [", 2),
        ("name: a\r\ntags: [\r\n", 2),
        ("name: a\rtags: {\r", 2),
    ] {
        let list = read_sample(text).expect_err(text).list;
        assert_eq!(list[0].line, line, "{text:?}: {}", list[0]);
    }
}

#[test]
fn the_display_names_file_and_line_of_each_mistake() {
    let mistakes = read_sample("nam: 1\n").expect_err("misspelt");
    assert_eq!(
        mistakes.to_string(),
        "sample.yaml:1: nam: unknown field: did you mean `name`?\nsample.yaml:1: name: missing: write a name"
    );
}

#[test]
fn a_value_of_another_type_is_named() {
    for (text, expected) in [
        ("[a]", "line 1: is a list: write a mapping (`name: value` lines)"),
        ("", "line 1: is empty: write a mapping (`name: value` lines)"),
        ("name: {a: b}", "line 1: name: is a mapping: write a single value"),
        ("name: true", "line 1: name: true is a truth value where text is expected: write \"true\""),
        ("name: ''", "line 1: name: the text is empty: write a value"),
        (
            "name: a\ntags: b",
            "line 2: tags: is the single value \"b\": write a list (`- item` lines or `[a, b]`)",
        ),
        ("name: ~", "line 1: name: missing: write a name"),
        (
            "name: a\n---\nname: b",
            "line 3: the file holds a second document: remove it and the `---` before it",
        ),
    ] {
        assert_eq!(problems(text), [expected], "{text:?}");
    }
}

#[test]
fn quotes_make_text_of_anything() {
    for text in ["name: \"5\"", "name: 'true'", "name: |-\n  5"] {
        assert!(read_sample(text).is_ok(), "{text:?}");
    }
}

#[test]
fn aliases_tags_and_odd_keys_are_refused_once_each() {
    let text = "name: &a web\ntags: [*a, !x y]\n? [k]\n: v\n";
    assert_eq!(
        problems(text),
        [
            "line 2: aliases (`*name`) are not supported: write the value out",
            "line 2: tag !x is not supported: remove it, quote text instead",
            "line 3: the name of a field is a list or mapping: write plain text",
        ]
    );
}

#[test]
fn broken_yaml_names_its_line() {
    let list = read_sample("name: web\ntags: [a\nmode: STRICT\n").expect_err("unclosed").list;
    assert_eq!(list.len(), 1);
    assert!(list[0].problem.starts_with("no YAML: "), "{}", list[0]);
    assert!(list[0].line >= 2, "{}", list[0]);
}

#[test]
fn hostile_files_end_in_one_mistake() {
    let laughs: String =
        (1..30).map(|i| format!("b{i}: &b{i} [{}]\n", vec![format!("*b{}", i - 1); 10].join(","))).collect();
    for (what, text) in [
        ("flow lists", "[".repeat(100_000)),
        ("flow mappings", "{a: ".repeat(100_000)),
        ("block lists", "- ".repeat(100_000)),
        ("keys", "? ".repeat(100_000)),
        ("indentation", (0..1000).map(|i| format!("{}a:\n", " ".repeat(i))).collect()),
        ("nodes", format!("name: [{}]", "a,".repeat(NODES))),
        ("aliases", format!("b0: &b0 [x]\n{laughs}")),
    ] {
        let list = read_sample(&text).expect_err(what).list;
        assert!(!list.is_empty() && list.len() <= MISTAKES_MAX + 1, "{what}: {}", list.len());
    }
}

const NODES: usize = 1_000_001;

#[test]
fn mistakes_past_the_bound_are_counted() {
    let text = format!("name: a\ntags: [{}]", "A,".repeat(150));
    let list = read_sample(&text).expect_err("many").list;
    assert_eq!(list.len(), MISTAKES_MAX + 1);
    assert_eq!(list[MISTAKES_MAX].problem, "50 more mistakes are not listed: correct those above first");
}
