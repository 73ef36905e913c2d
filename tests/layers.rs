//! The order of the layers, checked in the sources: a module uses only what stands left of it, so that each layer can be
//! read, tested and replaced without those built on top of it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The layers from left to right. The groups of one layer do not know each other; the modules of one group may.
const LAYERS: &[&[&[&str]]] = &[
    &[&["error", "atomic", "choice", "rng", "tensor"]],
    &[&["data"], &["backend"]],
    &[&["graph"]],
    &[&["ops"]],
    &[&["exec"], &["nn"]],
    &[&["train"]],
    &[&["eval", "export", "import", "report", "selftest"]],
    &[&["cli"]],
];

/// Words that a module's code never contains, though the order of the layers would let it, and why.
const FORBIDDEN: &[(&str, &[&str], &str)] = &[
    ("data", &["cuda", "gpu"], "data fills host memory that it is handed and knows no device"),
    ("nn", &["cuda", "gpu", "cpu", "backend"], "nn records a tape and names no device"),
];

/// Modules that treat all ops alike: they never name one, and so no case for a single op can grow in them.
const NAME_NO_OP: &[&str] = &["backend", "graph"];

#[test]
fn no_layer_uses_one_to_its_right() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let ops = op_names(&root.join("src/ops"));
    assert!(ops.contains("conv2d"), "no ops found in src/ops: {ops:?}");
    let mut violations = vec![];
    for path in rust_files(&root.join("src")) {
        let module = path.strip_prefix(root.join("src")).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let name = path.strip_prefix(root).unwrap().display().to_string();
        violations.extend(check(&name, &module_path(module), &text, &ops));
    }
    assert!(violations.is_empty(), "{} violations of the layer order:\n{}", violations.len(), violations.join("\n"));
}

/// All `.rs` files below `folder`, sorted.
fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = vec![];
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// `train/monitor.rs` is `["train", "monitor"]`, `train/mod.rs` is `["train"]`, `lib.rs` is `[]`.
fn module_path(file: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        file.with_extension("").iter().map(|name| name.to_string_lossy().into_owned()).collect();
    if names.last().is_some_and(|last| ["mod", "lib", "main"].contains(&last.as_str())) {
        names.pop();
    }
    names
}

/// The ops, by their files: `conv2d`, `batch_norm`, ... Those with everyday names (`add`) cannot be told from other uses
/// of the word; the arrows alone guard them.
fn op_names(folder: &Path) -> BTreeSet<String> {
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let names = paths.map(|path| path.file_stem().unwrap().to_string_lossy().into_owned());
    names.filter(|name| name.contains(|c: char| c == '_' || c.is_ascii_digit())).collect()
}

/// What `text`, the source of `module`, does against the rules; test code is free.
fn check(file: &str, module: &[String], text: &str, ops: &BTreeSet<String>) -> Vec<String> {
    let Some(top) = module.first().filter(|_| module.last().is_none_or(|last| last != "tests")) else {
        return vec![];
    };
    let tokens = without_tests(tokens(text));
    let mut violations = vec![];
    let mut report = |line: usize, what: String| violations.push(format!("{file}:{line}: {what}"));
    if place(top).is_none() {
        report(1, no_place(top));
    }
    for (used, line) in used_modules(&tokens, module.len()) {
        if let Some(reason) = arrow_fault(top, &used) {
            report(line, reason);
        }
    }
    for token in &tokens {
        for (_, words, reason) in FORBIDDEN.iter().filter(|(module, ..)| module == top) {
            if let Some(word) = words.iter().find(|word| snake_case(&token.text).split('_').any(|part| part == **word))
            {
                report(token.line, format!("`{}` names `{word}`: {reason}", token.text));
            }
        }
        if NAME_NO_OP.contains(&top.as_str()) && ops.contains(&snake_case(&token.text)) {
            report(token.line, format!("`{top}` names the op `{}`: what differs by op belongs in src/ops", token.text));
        }
    }
    violations
}

/// The layer of a module and its group within it.
fn place(module: &str) -> Option<(usize, usize)> {
    let group_of = |layer: &&[&[&str]]| layer.iter().position(|group| group.contains(&module));
    LAYERS.iter().enumerate().find_map(|(i, layer)| Some((i, group_of(layer)?)))
}

fn no_place(module: &str) -> String {
    format!("module `{module}` has no place in the layer order: give it one in tests/layers.rs and ARCHITECTURE.md")
}

/// Why `from` may not use `to`, if it may not.
fn arrow_fault(from: &str, to: &str) -> Option<String> {
    let (from_layer, from_group) = place(from)?;
    let Some((to_layer, to_group)) = place(to) else { return Some(no_place(to)) };
    if to_layer > from_layer {
        return Some(format!("`{from}` uses `{to}`, which stands to its right"));
    }
    (to_layer == from_layer && to_group != from_group).then(|| format!("`{from}` uses `{to}`, which stands beside it"))
}

/// The top-level modules that the tokens name by a path from the crate's root: `crate::a`, `crate::{a, b::c}`, or `super`
/// as often as the module, at `depth`, is deep.
fn used_modules(tokens: &[Token], depth: usize) -> Vec<(String, usize)> {
    let mut used = vec![];
    let text = |i: usize| tokens.get(i).map_or("", |token| token.text.as_str());
    for start in 0..tokens.len() {
        let mut at = start;
        if text(start) == "crate" && text(start + 1) == "::" {
            at += 2;
        } else if text(start) == "super" && (start == 0 || text(start - 1) != "::") {
            while text(at) == "super" && text(at + 1) == "::" {
                at += 2;
            }
            if (at - start) / 2 != depth {
                continue;
            }
        } else {
            continue;
        }
        if text(at) != "{" {
            used.extend(tokens.get(at).map(|token| (token.text.clone(), token.line)));
            continue;
        }
        let mut nesting = 0;
        for (i, token) in tokens.iter().enumerate().skip(at) {
            match token.text.as_str() {
                "{" => nesting += 1,
                "}" => nesting -= 1,
                name if nesting == 1 && matches!(text(i - 1), "{" | ",") => used.push((name.into(), token.line)),
                _ => {}
            }
            if nesting == 0 {
                break;
            }
        }
    }
    used
}

/// `BatchNorm`, `batch_norm` and `BATCH_NORM` alike as `batch_norm`.
fn snake_case(name: &str) -> String {
    let mut snake = String::new();
    let mut after_lower = false;
    for letter in name.chars() {
        if letter.is_uppercase() && after_lower {
            snake.push('_');
        }
        after_lower = letter.is_lowercase() || letter.is_ascii_digit();
        snake.extend(letter.to_lowercase());
    }
    snake
}

/// A word, `::` or any other single character of code.
#[derive(Debug, PartialEq)]
struct Token {
    text: String,
    line: usize,
}

/// The code of a source file, without comments, strings and characters.
fn tokens(text: &str) -> Vec<Token> {
    let chars: Vec<char> = text.chars().collect();
    let starts = |at: usize, what: &str| what.chars().enumerate().all(|(i, c)| chars.get(at + i) == Some(&c));
    let is_word = |c: &char| c.is_alphanumeric() || *c == '_';
    let (mut tokens, mut line, mut at) = (vec![], 1, 0);
    while at < chars.len() {
        let start = at;
        if starts(at, "//") {
            at = (at..chars.len()).find(|&i| chars[i] == '\n').unwrap_or(chars.len());
        } else if starts(at, "/*") {
            at = end_of_comment(&chars, at);
        } else if let Some(end) = end_of_literal(&chars, at) {
            at = end;
        } else if is_word(&chars[at]) {
            at = (at..chars.len()).find(|&i| !is_word(&chars[i])).unwrap_or(chars.len());
            tokens.push(Token { text: chars[start..at].iter().collect(), line });
        } else if starts(at, "::") {
            at += 2;
            tokens.push(Token { text: "::".into(), line });
        } else {
            at += 1;
            if !chars[start].is_whitespace() {
                tokens.push(Token { text: chars[start].into(), line });
            }
        }
        line += chars[start..at].iter().filter(|c| **c == '\n').count();
    }
    tokens
}

/// Block comments nest.
fn end_of_comment(chars: &[char], start: usize) -> usize {
    let (mut depth, mut at) = (0, start);
    while at < chars.len() {
        match chars[at..].first_chunk::<2>() {
            Some(['/', '*']) => (depth, at) = (depth + 1, at + 2),
            Some(['*', '/']) => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

/// Where the string or character that starts at `start` ends, if one does.
fn end_of_literal(chars: &[char], start: usize) -> Option<usize> {
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    if at(start) == '"' {
        return Some(end_of_quoted(chars, start, '"'));
    }
    if at(start) == '\'' {
        // 'a' and '\n' are characters, 'a in &'a str is a lifetime.
        let character = at(start + 1) == '\\' || at(start + 2) == '\'';
        return character.then(|| end_of_quoted(chars, start, '\''));
    }
    // r"...", r#"..."#, br#"..."#, but not the r of a longer word.
    let within_word = start > 0 && (at(start - 1).is_alphanumeric() || at(start - 1) == '_');
    let prefix = if at(start) == 'b' && at(start + 1) == 'r' { 2 } else { 1 };
    if within_word || at(start + prefix - 1) != 'r' {
        return None;
    }
    let hashes = (start + prefix..).take_while(|&i| at(i) == '#').count();
    if at(start + prefix + hashes) != '"' {
        return None;
    }
    let closing: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
    let body = start + prefix + hashes + 1;
    let found = chars[body..].windows(closing.len()).position(|window| window == closing);
    Some(found.map_or(chars.len(), |offset| body + offset + closing.len()))
}

fn end_of_quoted(chars: &[char], start: usize, quote: char) -> usize {
    let mut at = start + 1;
    while at < chars.len() && chars[at] != quote {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    (at + 1).min(chars.len())
}

/// Drops each `#[cfg(test)]` and the item after it, up to its closing brace or semicolon.
fn without_tests(tokens: Vec<Token>) -> Vec<Token> {
    let marker = ["#", "[", "cfg", "(", "test", ")", "]"];
    let mut kept = vec![];
    let mut rest = tokens.into_iter().peekable();
    while let Some(token) = rest.next() {
        kept.push(token);
        let ends_in_marker = kept.len() >= marker.len() && {
            let tail = &kept[kept.len() - marker.len()..];
            tail.iter().map(|token| &token.text).eq(marker)
        };
        if !ends_in_marker {
            continue;
        }
        kept.truncate(kept.len() - marker.len());
        let mut nesting = 0;
        for token in rest.by_ref() {
            match token.text.as_str() {
                "{" => nesting += 1,
                "}" => nesting -= 1,
                _ => {}
            }
            if nesting == 0 && matches!(token.text.as_str(), "}" | ";") {
                break;
            }
        }
    }
    kept
}

mod the_checker {
    use super::*;

    fn faults(file: &str, text: &str) -> Vec<String> {
        let ops = ["conv2d", "batch_norm"].map(String::from).into();
        check(&format!("src/{file}"), &module_path(Path::new(file)), text, &ops)
    }

    #[test]
    fn names_file_line_and_arrow() {
        let text = "//! Doc.\n\nuse crate::error::Result;\nuse crate::train::step;\n";
        assert_eq!(faults("ops/mod.rs", text), ["src/ops/mod.rs:4: `ops` uses `train`, which stands to its right"]);
        assert_eq!(
            faults("exec/cpu.rs", "use crate::nn::Store;"),
            ["src/exec/cpu.rs:1: `exec` uses `nn`, which stands beside it"]
        );
        assert_eq!(faults("error.rs", "use crate::novel::X;").len(), 1);
        assert_eq!(faults("novel.rs", "use crate::error::X;").len(), 1);
    }

    #[test]
    fn sees_every_form_of_a_path() {
        let grouped =
            "use crate::{\n    error::{Error, Result},\n    graph::{self, cli},\n    exec,\n    cli::main,\n};";
        assert_eq!(faults("ops/conv2d/mod.rs", grouped).len(), 2);
        assert!(faults("ops/conv2d/mod.rs", grouped)[0].starts_with("src/ops/conv2d/mod.rs:4: "));
        assert_eq!(faults("graph/plan.rs", "fn f() { let x = crate::ops::all(); }").len(), 1);
        assert_eq!(faults("graph/plan.rs", "use super::super::ops::all;").len(), 1);
        assert_eq!(faults("graph/plan.rs", "use super::tape::Tape;"), [""; 0]);
        assert_eq!(faults("rng.rs", "use super::data;").len(), 1);
    }

    #[test]
    fn lets_through_what_is_no_arrow() {
        let allowed = [
            "// use crate::cli::main;\n/* crate::cli /* nested */ crate::cli */",
            "const HELP: &str = \"crate::cli \\\" crate::cli\"; const RAW: &[u8] = br#\"crate::cli\"\"#;",
            "pub(crate) fn f<'a>(quote: char, x: &'a str) -> bool { quote == '\"' && quote != '\\'' }",
            "use crate::error::Result;\n#[cfg(test)]\nmod tests { use crate::cli::main; fn f() { crate::train::g() } }",
            "#[cfg(test)]\nuse crate::cli::main;\n",
        ];
        for text in allowed {
            assert_eq!(faults("tensor/mod.rs", text), [""; 0], "{text}");
        }
        let after_tests = "#[cfg(test)]\nmod tests { fn f() {} }\nuse crate::cli::main;";
        assert_eq!(
            faults("tensor/mod.rs", after_tests),
            ["src/tensor/mod.rs:3: `tensor` uses `cli`, which stands to its right"]
        );
        assert_eq!(faults("graph/tests.rs", "use crate::ops::conv2d;"), [""; 0]);
        assert_eq!(faults("main.rs", "use simsiam_engine::cli;"), [""; 0]);
    }

    #[test]
    fn keeps_devices_and_ops_out_of_where_they_do_not_belong() {
        assert_eq!(faults("data/loader.rs", "fn pinned(stream: CudaStream) {}").len(), 1);
        assert_eq!(faults("data/loader.rs", "// not CUDA\nfn scuda() {}"), [""; 0]);
        assert_eq!(faults("nn/resnet.rs", "fn f(device: &cpu::Device) {}").len(), 1);
        assert_eq!(faults("backend/cpu/gemm.rs", "fn conv2d() {}").len(), 1);
        assert_eq!(faults("graph/plan.rs", "if name == Op::BatchNorm {}").len(), 1);
        assert_eq!(faults("graph/plan.rs", "struct BatchNormal;"), [""; 0]);
        assert_eq!(faults("ops/batch_norm.rs", "struct BatchNorm;"), [""; 0]);
    }
}
