//! Checks that no files of a crate import each other in a circle, so that each can be read with only those below it.
//!
//! A file depends on the file that defines a name, wherever a parent re-exports it. A parent that only declares and
//! re-exports its children therefore depends on none of them. Code for tests and fuzzing is left out.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::iter::Peekable;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use proc_macro2::{Delimiter, TokenStream, TokenTree};
use quote::ToTokens as _;
use serde_json::Value;
use syn::{Attribute, Item, UseTree, Visibility};

use crate::crate_borders::metadata;

/// Maximum number of imports that are followed from one name; some import each other with `*`.
const IMPORTS_MAX: usize = 16;

/// A path as it is written: `crate::queue::Chain` is three names.
type Names = Vec<String>;

#[derive(Default)]
struct Module {
    file: PathBuf,
    parent: Option<usize>,
    children: BTreeMap<String, usize>,
    /// Names defined here, with their files.
    defined: BTreeMap<String, PathBuf>,
    /// Whether macros may define more of them.
    is_generated: bool,
    /// Names imported here, with their paths.
    imported: BTreeMap<String, Names>,
    /// Paths of modules that are imported with `*`.
    globs: Vec<Names>,
    /// Every path in the code, except for re-exports of children.
    paths: Vec<Names>,
}

enum Target {
    Module(usize),
    File(PathBuf),
}

/// The modules of one crate, the root first.
#[derive(Default)]
struct Crate(Vec<Module>);

/// Files that each file depends on, with one path that shows it.
type Graph = BTreeMap<PathBuf, BTreeMap<PathBuf, String>>;

impl Module {
    fn import(&mut self, tree: &UseTree, mut path: Names, is_reexport: bool) {
        match tree {
            UseTree::Path(step) => {
                path.push(step.ident.to_string());
                return self.import(&step.tree, path, is_reexport);
            }
            UseTree::Group(group) => {
                for tree in &group.items {
                    self.import(tree, path.clone(), is_reexport);
                }
                return;
            }
            UseTree::Glob(_) => self.globs.push(path.clone()),
            UseTree::Name(name) => {
                if name.ident != "self" {
                    path.push(name.ident.to_string());
                }
                let name = path.last().cloned().unwrap_or_default();
                self.imported.insert(name, path.clone());
            }
            UseTree::Rename(rename) => {
                path.push(rename.ident.to_string());
                self.imported
                    .insert(rename.rename.to_string(), path.clone());
            }
        }
        let is_child = path.iter().find(|name| *name != "self");
        let is_child = is_child.is_some_and(|name| self.children.contains_key(name));
        if !(is_reexport && is_child) {
            self.paths.push(path);
        }
    }

    /// Adds the paths of two or more names in code and in macros, and the imports inside functions.
    fn read_code(&mut self, tokens: TokenStream) {
        let mut tokens = tokens.into_iter().peekable();
        let mut path = Names::new();
        while let Some(token) = tokens.next() {
            match token {
                mark if is_mark(&mark, '#') && tokens.peek().is_some_and(is_test_attribute) => {
                    tokens.find(ends_item);
                }
                TokenTree::Ident(word) if word == "use" => {
                    let import = tokens.by_ref().take_while(|it| !is_mark(it, ';'));
                    if let Ok(tree) = syn::parse2(import.collect()) {
                        self.import(&tree, Names::new(), false);
                    }
                }
                TokenTree::Ident(word) => {
                    path.push(word.to_string());
                    let colon = |tokens: &mut Peekable<_>| tokens.next_if(|it| is_mark(it, ':'));
                    if colon(&mut tokens)
                        .and_then(|_| colon(&mut tokens))
                        .is_some()
                    {
                        continue;
                    }
                }
                TokenTree::Group(group) => self.read_code(group.stream()),
                _ => {}
            }
            let path = std::mem::take(&mut path);
            if path.len() > 1 || path.iter().any(|name| name.starts_with(char::is_uppercase)) {
                self.paths.push(path);
            }
        }
    }
}

impl Crate {
    fn read(root: &Path) -> Result<Self> {
        let mut this = Self::default();
        this.read_file(root, root.parent().context("a folder")?, None)?;
        Ok(this)
    }

    /// Reads a file whose children are in `folder`.
    fn read_file(&mut self, file: &Path, folder: &Path, parent: Option<usize>) -> Result<usize> {
        let place = || file.display().to_string();
        let source = fs::read_to_string(file).with_context(place)?;
        let syntax = syn::parse_file(&source).with_context(place)?;
        self.read_module(&syntax.items, file, folder, parent)
    }

    fn read_module(
        &mut self,
        items: &[Item],
        file: &Path,
        folder: &Path,
        parent: Option<usize>,
    ) -> Result<usize> {
        let this = self.0.len();
        self.0.push(Module {
            file: file.to_owned(),
            parent,
            ..Module::default()
        });
        for item in items {
            match item {
                Item::Mod(module) if is_product(&module.attrs) => {
                    let name = module.ident.to_string();
                    let folder = folder.join(&name);
                    let child = if let Some((_, items)) = &module.content {
                        self.read_module(items, file, &folder, Some(this))?
                    } else {
                        let beside = folder.with_extension("rs");
                        let inside = folder.join("mod.rs");
                        let file = if beside.is_file() { beside } else { inside };
                        self.read_file(&file, &folder, Some(this))?
                    };
                    self.0[this].children.insert(name, child);
                }
                Item::Use(import) if is_product(&import.attrs) => {
                    let is_reexport = !matches!(import.vis, Visibility::Inherited);
                    self.0[this].import(&import.tree, Names::new(), is_reexport);
                }
                Item::Mod(_) | Item::Use(_) => {}
                item => {
                    let tokens = item.to_token_stream();
                    let mut definer = this;
                    if let Item::Macro(it) = item {
                        let exported = |it: &Attribute| it.path().is_ident("macro_export");
                        if it.attrs.iter().any(exported) {
                            definer = 0;
                        }
                        self.0[this].is_generated |= it.ident.is_none();
                    }
                    let name = defined_name(tokens.clone());
                    let defined = name.map(|name| (name, file.to_owned()));
                    self.0[definer].defined.extend(defined);
                    match item {
                        // The names of its variants may be those of other types.
                        Item::Enum(it) => {
                            for variant in &it.variants {
                                self.0[this].read_code(variant.fields.to_token_stream());
                            }
                        }
                        _ => self.0[this].read_code(tokens),
                    }
                }
            }
        }
        Ok(this)
    }

    /// The target of a path in a module; `None` if it leads out of the crate.
    fn resolve(&self, module: usize, path: &[String], imports: usize) -> Option<Target> {
        let (first, rest) = path.split_first()?;
        let mut target = match first.as_str() {
            "crate" => Target::Module(0),
            "self" => Target::Module(module),
            "super" => Target::Module(self.0[module].parent?),
            name => self.look_up(module, name, imports)?,
        };
        for name in rest {
            let Target::Module(at) = target else {
                break;
            };
            let module = &self.0[at];
            let generated = || {
                module
                    .is_generated
                    .then(|| Target::File(module.file.clone()))
            };
            target = match name.as_str() {
                "super" => Target::Module(module.parent?),
                name => self.look_up(at, name, imports).or_else(generated)?,
            };
        }
        Some(target)
    }

    fn look_up(&self, module: usize, name: &str, imports: usize) -> Option<Target> {
        let at = &self.0[module];
        if let Some(child) = at.children.get(name) {
            return Some(Target::Module(*child));
        }
        if let Some(file) = at.defined.get(name) {
            return Some(Target::File(file.clone()));
        }
        let imports = imports.checked_sub(1)?;
        if let Some(path) = at.imported.get(name) {
            return self.resolve(module, path, imports);
        }
        at.globs
            .iter()
            .find_map(|path| match self.resolve(module, path, imports)? {
                Target::Module(globbed) if globbed != module => {
                    self.look_up(globbed, name, imports)
                }
                _ => None,
            })
    }

    fn graph(&self) -> Graph {
        let mut graph = Graph::new();
        for (number, module) in self.0.iter().enumerate() {
            for path in &module.paths {
                let Some(Target::File(file)) = self.resolve(number, path, IMPORTS_MAX) else {
                    continue;
                };
                if file != module.file {
                    let used = graph.entry(module.file.clone()).or_default();
                    used.entry(file).or_insert_with(|| path.join("::"));
                }
            }
        }
        graph
    }
}

/// Whether code with these attributes is in the product.
fn is_product(attributes: &[Attribute]) -> bool {
    attributes
        .iter()
        .all(|it| !is_for_tests(&it.meta.to_token_stream().to_string()))
}

fn is_for_tests(attribute: &str) -> bool {
    let names_tests = ["test", "fuzzing"].iter().any(|it| attribute.contains(it));
    attribute.starts_with("cfg") && names_tests && !attribute.contains("not")
}

/// The name that an item defines for its module.
fn defined_name(tokens: TokenStream) -> Option<String> {
    const KINDS: &[&str] = &[
        "struct",
        "enum",
        "union",
        "trait",
        "type",
        "fn",
        "const",
        "static",
        "macro_rules",
    ];
    let mut kind_seen = false;
    for token in tokens {
        match token {
            TokenTree::Ident(word) if word == "impl" => return None,
            TokenTree::Ident(word) if KINDS.iter().any(|kind| word == kind) => kind_seen = true,
            TokenTree::Ident(word) if kind_seen && word != "mut" && word != "unsafe" => {
                return Some(word.to_string());
            }
            _ => {}
        }
    }
    None
}

fn is_mark(token: &TokenTree, mark: char) -> bool {
    matches!(token, TokenTree::Punct(it) if it.as_char() == mark)
}

/// Whether a token is the bracket of an attribute that keeps code for tests.
fn is_test_attribute(token: &TokenTree) -> bool {
    matches!(token, TokenTree::Group(it) if is_for_tests(&it.stream().to_string()))
}

/// Whether a token is the last of an item, a field or a statement.
fn ends_item(token: &TokenTree) -> bool {
    match token {
        TokenTree::Group(group) => group.delimiter() == Delimiter::Brace,
        mark => is_mark(mark, ';') || is_mark(mark, ','),
    }
}

/// The groups of files that depend on each other in both directions.
fn circles(graph: &Graph) -> Vec<BTreeSet<&Path>> {
    let reached_from = |file: &PathBuf| {
        let mut reached = BTreeSet::new();
        let mut open = vec![file];
        while let Some(file) = open.pop() {
            for used in graph.get(file).into_iter().flat_map(BTreeMap::keys) {
                if reached.insert(used.as_path()) {
                    open.push(used);
                }
            }
        }
        reached
    };
    let reached: BTreeMap<_, _> = graph
        .keys()
        .map(|it| (it.as_path(), reached_from(it)))
        .collect();
    let in_both = |a: &Path, b: &Path| {
        reached[a].contains(b) && reached.get(b).is_some_and(|it| it.contains(a))
    };
    let circles: BTreeSet<BTreeSet<&Path>> = reached
        .keys()
        .map(|file| {
            reached[file]
                .iter()
                .copied()
                .filter(|it| in_both(file, it))
                .collect()
        })
        .collect();
    circles.into_iter().filter(|it| !it.is_empty()).collect()
}

/// Describes every circle in the files below a crate's root.
fn describe_circles(root: &Path) -> Result<String> {
    let graph = Crate::read(root)?.graph();
    let mut text = String::new();
    for circle in circles(&graph) {
        writeln!(text, "{} files import each other:", circle.len())?;
        for file in &circle {
            let used = graph[*file].iter();
            for (used, path) in used.filter(|(used, _)| circle.contains(used.as_path())) {
                let (file, used) = (file.display(), used.display());
                writeln!(text, "  {file} uses {used}: {path}")?;
            }
        }
    }
    Ok(text)
}

/// The first file of every library and program of the workspace.
fn roots() -> Result<Vec<PathBuf>> {
    let metadata = metadata()?;
    let packages = metadata["packages"].as_array().context("packages")?.iter();
    let targets = packages.filter_map(|it| it["targets"].as_array()).flatten();
    let is_code = |target: &&Value| {
        let mut kinds = target["kind"].as_array().into_iter().flatten();
        kinds.any(|kind| kind == "lib" || kind == "bin" || kind == "proc-macro")
    };
    let roots = targets.filter(is_code);
    let roots = roots.filter_map(|it| it["src_path"].as_str());
    Ok(roots.map(PathBuf::from).collect())
}

#[test]
fn files_of_a_crate_import_each_other_in_no_circle() -> Result<()> {
    let roots = roots()?;
    ensure!(roots.len() > 10, "{roots:?}");
    let mut text = String::new();
    for root in &roots {
        text += &describe_circles(root)?;
    }
    ensure!(
        text.is_empty(),
        "{text}move what both need to a file below them"
    );
    Ok(())
}

/// Circles in a crate of these files.
fn circles_of(files: &[(&str, &str)]) -> Result<String> {
    let folder = tempfile::tempdir()?;
    for (name, source) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().context("a folder")?)?;
        fs::write(path, source)?;
    }
    let text = describe_circles(&folder.path().join("lib.rs"))?;
    Ok(text.replace(&format!("{}/", folder.path().display()), ""))
}

#[test]
fn planted_circles_are_found_and_named() -> Result<()> {
    let lib = ("lib.rs", "mod a;\nmod b;\nmod c;\n");
    let a = ("a.rs", "use crate::b::Above;\npub struct Base;\n");
    let c = (
        "c.rs",
        "use crate::{a::Base, b};\nfn f() -> Base { b::f() }\n",
    );
    // By an import, a path in code, one in a macro, an import in a function, and another name of the same module.
    for b in [
        "use super::a::Base;\n",
        "fn f() -> crate::a::Base { loop {} }\n",
        "fn f() { log!(\"\", crate::a::Base); }\n",
        "fn f() { use crate::a::{Base}; }\n",
        "use super::a as below;\nfn f(_: below::Base) {}\n",
        "pub mod deep { fn f(_: super::super::a::Base) {} }\n",
    ] {
        let b = format!("{b}pub struct Above;\npub fn f() {{}}\n");
        let found = circles_of(&[lib, a, ("b.rs", &b), c])?;
        ensure!(
            found.starts_with("2 files import each other:"),
            "{b}: {found}"
        );
        ensure!(
            found.contains("a.rs uses b.rs: crate::b::Above\n"),
            "{b}: {found}"
        );
        ensure!(
            found.contains("b.rs uses a.rs: ") && !found.contains("c.rs"),
            "{b}: {found}"
        );
    }
    // Through a re-export, and with a parent that uses what it re-exports.
    let child = ("a/child.rs", "use super::Error;\npub struct Child;\n");
    let parent = "mod child;\npub use child::Child;\npub struct Error;\n";
    let other = (
        "b.rs",
        "use crate::a::Child;\npub struct Above;\npub fn f() {}\n",
    );
    let uses = format!("{parent}pub struct Parent(Child);\n");
    let found = circles_of(&[lib, ("a/mod.rs", &uses), child, other, c])?;
    ensure!(
        found.contains("a/mod.rs uses a/child.rs: Child\n"),
        "{found}"
    );
    let back = ("a/child.rs", "use crate::b::Above;\npub struct Child;\n");
    let found = circles_of(&[lib, ("a/mod.rs", parent), back, other, c])?;
    ensure!(
        found.contains("b.rs uses a/child.rs: crate::a::Child\n"),
        "{found}"
    );
    Ok(())
}

#[test]
fn files_without_a_circle_are_accepted() -> Result<()> {
    let lib = "mod a;\npub use a::Child;\n#[cfg(test)]\nmod tests;\n";
    let a = "mod child;\nmod kind;\npub use child::Child;\npub use kind::Kind;\npub struct Error;\n\
             pub enum Fault { Child, Kind }\n#[cfg(test)]\nfn f() -> child::Child { loop {} }\n";
    let child = "use super::{Error, Kind};\n// crate::a::Child\npub struct Child(Error, Kind);\n\
                 #[cfg(test)]\nmod tests { use crate::Child; }\n";
    let files = [
        ("lib.rs", lib),
        ("a/mod.rs", a),
        ("a/child.rs", child),
        (
            "a/kind.rs",
            "use std::io;\npub type Kind = io::ErrorKind;\n",
        ),
    ];
    let found = circles_of(&files)?;
    ensure!(found.is_empty(), "{found}");
    Ok(())
}
