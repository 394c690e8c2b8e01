//! A value tree against the JSON schema that the structs derive: every problem at once, with key paths,
//! nearest keys, expected and got. Numbers are normalised on the way (`3e12` and `"3T"` to an integer).

use serde_json::Value;

/// The schema of a configuration struct.
pub struct Schema {
    root: Value,
}

impl Schema {
    /// Of any type that derives `JsonSchema`.
    pub fn of<T: schemars::JsonSchema>() -> Self {
        Self { root: schemars::schema_for!(T).to_value() }
    }

    /// Follows `$ref` into the definitions.
    pub fn resolve<'a>(&'a self, node: &'a Value) -> &'a Value {
        let target = node.get("$ref").and_then(Value::as_str);
        let found = target.and_then(|r| self.root.pointer(r.trim_start_matches('#')));
        found.map_or(node, |node| self.resolve(node))
    }

    /// The root object.
    pub fn root(&self) -> &Value {
        &self.root
    }

    /// The schema node of a key path, list positions skipped.
    pub fn find(&self, keys: &[&str]) -> Result<&Value, String> {
        let mut node = &self.root;
        let mut path = String::new();
        for key in keys {
            let at = self.container(node);
            if let (Some(items), Ok(_)) = (at.get("items"), key.parse::<usize>()) {
                node = items;
                path = join(&path, key);
                continue;
            }
            let properties = at.get("properties").and_then(Value::as_object);
            let Some(properties) = properties else {
                // A free-form map, such as `model_config`: its fields are checked by their own schema.
                return if is_free(at) {
                    Ok(at)
                } else {
                    Err(format!("`{path}` has no keys below it"))
                };
            };
            match properties.get(*key) {
                Some(child) => node = child,
                None => return Err(unknown(&path, key, properties.keys().map(String::as_str))),
            }
            path = join(&path, key);
        }
        Ok(node)
    }

    /// The schema of the value where it is not null.
    pub fn non_null<'a>(&'a self, node: &'a Value) -> &'a Value {
        let node = self.resolve(node);
        let options = node.get("anyOf").and_then(Value::as_array);
        let value = |n: &&Value| n.get("type").and_then(Value::as_str) != Some("null");
        let mut values = options.into_iter().flatten().filter(value);
        match (values.next(), values.next()) {
            (Some(option), None) => self.resolve(option),
            _ => node,
        }
    }

    /// The schema of the value where it has keys or positions below it, if it ever has.
    pub fn container<'a>(&'a self, node: &'a Value) -> &'a Value {
        let node = self.non_null(node);
        let options = node.get("anyOf").and_then(Value::as_array);
        let options = options.into_iter().flatten().map(|option| self.resolve(option));
        let below = |n: &&Value| n.get("items").is_some() || n.get("properties").is_some();
        options.into_iter().find(below).unwrap_or(node)
    }
}

/// Whether an object takes any key.
fn is_free(node: &Value) -> bool {
    accepts(node, "object") && node.get("properties").is_none()
}

/// `Err` with the nearest valid key where a path leads nowhere.
pub fn known_path(schema: &Schema, keys: &[&str]) -> Result<(), String> {
    schema.find(keys).map(|_| ())
}

/// Checks a tree in place; problems are appended.
pub fn check(tree: &mut Value, schema: &Schema, problems: &mut Vec<String>) {
    check_node("", tree, &schema.root, schema, problems);
}

/// `a` + `b` -> `a.b`.
pub fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

/// The message for an unknown key.
fn unknown<'a>(path: &str, key: &str, known: impl Iterator<Item = &'a str>) -> String {
    let full = join(path, key);
    match nearest(key, known) {
        Some(near) => format!("`{full}`: unknown key; did you mean `{}`?", join(path, near)),
        None => format!("`{full}`: unknown key"),
    }
}

/// The candidate most like `word`, if any is like it at all.
pub fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .map(|c| (strsim::jaro_winkler(&word.to_lowercase(), &c.to_lowercase()), c))
        .filter(|(score, _)| *score > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, c)| c)
}

fn accepts(node: &Value, kind: &str) -> bool {
    match node.get("type") {
        Some(Value::String(t)) => t == kind,
        Some(Value::Array(list)) => list.iter().any(|t| t == kind),
        _ => false,
    }
}

fn check_node(
    path: &str,
    value: &mut Value,
    node: &Value,
    schema: &Schema,
    problems: &mut Vec<String>,
) {
    let node = schema.resolve(node);
    if let Some(options) = node.get("anyOf").and_then(Value::as_array) {
        return check_any(path, value, options, schema, problems);
    }
    if let Some(choices) = choices(node) {
        if !choices.iter().any(|c| c == value) {
            problems.push(wrong_choice(path, value, &choices));
        }
        return;
    }
    if value.is_null() && accepts(node, "null") {
        return;
    }
    normalise(value, node);
    match value {
        Value::Object(map) if accepts(node, "object") => {
            let Some(properties) = node.get("properties").and_then(Value::as_object) else {
                return;
            };
            let required = node.get("required").and_then(Value::as_array);
            for key in required.into_iter().flatten().filter_map(Value::as_str) {
                if !map.contains_key(key) {
                    problems.push(format!("`{}`: missing", join(path, key)));
                }
            }
            for (key, child) in map.iter_mut() {
                match properties.get(key) {
                    Some(node) => check_node(&join(path, key), child, node, schema, problems),
                    None => {
                        problems.push(unknown(path, key, properties.keys().map(String::as_str)))
                    }
                }
            }
        }
        Value::Array(items) if accepts(node, "array") => {
            let (min, max) = (node.get("minItems"), node.get("maxItems"));
            if let (Some(want), true) = (min.and_then(Value::as_u64), min == max)
                && items.len() as u64 != want
            {
                problems.push(format!("`{path}`: expected {want} values, got {}", items.len()));
            }
            let Some(item) = node.get("items") else { return };
            for (i, child) in items.iter_mut().enumerate() {
                check_node(&join(path, &i.to_string()), child, item, schema, problems);
            }
        }
        value
            if !(accepts(node, kind_of(value)) || accepts(node, "number") && value.is_number()) =>
        {
            let at = if path.is_empty() { "the file".into() } else { format!("`{path}`") };
            problems.push(format!(
                "{at}: expected {}, got {}",
                expected(node, schema),
                shown(value)
            ));
        }
        value
            if accepts(node, "integer")
                && value.as_i64().is_some_and(|n| n < 0)
                && node.get("minimum").and_then(Value::as_f64) == Some(0.0) =>
        {
            problems.push(format!("`{path}`: expected an integer of at least 0, got {value}"));
        }
        _ => {}
    }
}

/// One of several schemas: the first that fits. Where none does, a table's own problems are the useful ones.
fn check_any(
    path: &str,
    value: &mut Value,
    options: &[Value],
    schema: &Schema,
    problems: &mut Vec<String>,
) {
    let mut inner = Vec::new();
    for option in options {
        let mut copy = value.clone();
        let mut found = Vec::new();
        check_node(path, &mut copy, option, schema, &mut found);
        if found.is_empty() {
            *value = copy;
            return;
        }
        let deeper = |p: &String| !p.starts_with(&format!("`{path}`"));
        if found.iter().any(deeper) || choices(schema.resolve(option)).is_some() {
            inner = found;
        }
    }
    if inner.is_empty() {
        let names: Vec<String> =
            options.iter().map(|o| expected(schema.resolve(o), schema)).collect();
        inner.push(format!("`{path}`: expected {}, got {}", names.join(" or "), shown(value)));
    }
    problems.extend(inner);
}

/// Values of an enum, if the node is one.
pub fn choices(node: &Value) -> Option<Vec<Value>> {
    if let Some(list) = node.get("enum").and_then(Value::as_array) {
        return Some(list.clone());
    }
    let variants = node.get("oneOf").and_then(Value::as_array)?;
    variants.iter().map(|v| v.get("const").cloned()).collect()
}

fn wrong_choice(path: &str, value: &Value, choices: &[Value]) -> String {
    let names: Vec<&str> = choices.iter().filter_map(Value::as_str).collect();
    let near = value.as_str().and_then(|word| nearest(word, names.iter().copied()));
    let suggestion = near.map_or(String::new(), |n| format!("; did you mean `{n}`?"));
    let list: Vec<String> = names.iter().map(|n| format!("`{n}`")).collect();
    format!("`{path}`: expected one of {}, got {}{suggestion}", list.join(", "), shown(value))
}

/// `3e12`, `3_000_000`, `"3T"` where an integer or a number is wanted.
fn normalise(value: &mut Value, node: &Value) {
    let whole = accepts(node, "integer");
    let number = match value {
        Value::String(text) if whole || accepts(node, "number") => parse_number(text),
        Value::Number(n) if whole => n.as_f64(),
        _ => None,
    };
    let Some(number) = number else { return };
    if whole && number.fract() == 0.0 && number.abs() < 9e18 && value.as_u64().is_none() {
        *value = match number < 0.0 {
            true => Value::from(number as i64),
            false => Value::from(number as u64),
        };
    } else if !whole {
        *value = Value::from(number);
    }
}

/// A number with `_` separators or a suffix K, M, B (G) or T.
fn parse_number(text: &str) -> Option<f64> {
    let text = text.trim().replace('_', "");
    let exponent = match text.chars().last()? {
        'K' | 'k' => 3,
        'M' => 6,
        'B' | 'G' => 9,
        'T' => 12,
        _ => return text.parse().ok().filter(|x: &f64| x.is_finite()),
    };
    let digits = text[..text.len() - 1].trim();
    // Read `1.07B` as `1.07e9`: 1.07 * 1e9 in floating point is no whole number.
    let plain = digits.bytes().all(|b| b.is_ascii_digit() || b"+-.".contains(&b));
    let number = if plain { format!("{digits}e{exponent}").parse() } else { return None };
    number.ok().filter(|x: &f64| x.is_finite())
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(n) if n.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// What a node wants, in words.
pub fn expected(node: &Value, schema: &Schema) -> String {
    let node = schema.resolve(node);
    if let Some(choices) = choices(node) {
        let list: Vec<String> = choices.iter().map(shown).collect();
        return format!("one of {}", list.join(", "));
    }
    if let Some(options) = node.get("anyOf").and_then(Value::as_array) {
        let names: Vec<String> = options.iter().map(|o| expected(o, schema)).collect();
        return names.join(" or ");
    }
    let word = |t: &str| match t {
        "object" => "a table of keys",
        "array" => "a list",
        "integer" => "an integer",
        "number" => "a number",
        "string" => "text",
        "boolean" => "true or false",
        _ => "null",
    };
    match node.get("type") {
        Some(Value::String(t)) => word(t).to_owned(),
        Some(Value::Array(list)) => {
            let names: Vec<&str> = list.iter().filter_map(Value::as_str).map(word).collect();
            names.join(" or ")
        }
        _ => "any value".to_owned(),
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => format!("`{text}`"),
        Value::Object(_) => "a table of keys".into(),
        Value::Array(items) => format!("a list of {}", items.len()),
        other => format!("`{other}`"),
    }
}
