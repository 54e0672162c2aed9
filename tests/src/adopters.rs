//! Reads the files of `tests/adopters/`.

use anyhow::{Context, Result, ensure};

/// Requests of an adopter, in order.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Conversation {
    /// The VMM's command line.
    pub arguments: Vec<String>,
    /// Its requests.
    pub requests: Vec<Request>,
}

/// One request.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    /// `PUT`, `GET`, or `CHUNKED` for a PUT whose empty body comes in chunks.
    pub method: String,
    /// The endpoint.
    pub endpoint: String,
    /// The body, if there is one.
    pub body: Option<String>,
}

impl Conversation {
    /// Reads a file in which `replacements` stand for what only the test knows.
    ///
    /// # Errors
    /// The file does not have the form that its README describes.
    pub fn read(text: &str, replacements: &[(&str, &str)]) -> Result<Self> {
        let mut text: String = text
            .lines()
            .filter(|line| !line.starts_with('#'))
            .fold(String::new(), |text, line| text + line + "\n");
        for (name, value) in replacements {
            text = text.replace(name, value);
        }
        let mut read = Self::default();
        let mut is_command_line = false;
        for line in text.lines().filter(|line| !line.is_empty()) {
            let (first, rest) = line.split_once(' ').unwrap_or((line, ""));
            match first {
                "RUN" => is_command_line = true,
                "PUT" | "GET" | "CHUNKED" => {
                    is_command_line = false;
                    read.requests.push(Request {
                        method: first.to_owned(),
                        endpoint: rest.to_owned(),
                        body: None,
                    });
                }
                "--cmdline" if is_command_line => {
                    read.arguments.extend([first.to_owned(), rest.to_owned()]);
                }
                _ if is_command_line => {
                    let words = line.split(' ').map(str::to_owned);
                    read.arguments.extend(words);
                }
                _ => {
                    let request = read.requests.last_mut().context("a body of no request")?;
                    let body = request.body.get_or_insert_default();
                    body.push_str(line);
                    body.push('\n');
                }
            }
        }
        ensure!(read != Self::default(), "the file is empty");
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversation_has_arguments_and_requests_with_bodies() {
        let text = "# why\nRUN\n--cpus boot=1\n--cmdline @x b\n\nPUT vm.create\n{\n 1}\n\n# x\nPUT vm.boot\n";
        let read = Conversation::read(text, &[("@x", "y")]).unwrap();
        assert_eq!(read.arguments, ["--cpus", "boot=1", "--cmdline", "y b"]);
        let bodies: Vec<_> = read.requests.iter().map(|it| it.body.as_deref()).collect();
        assert_eq!(bodies, [Some("{\n 1}\n"), None]);
        assert!(Conversation::read("{}", &[]).is_err());
        assert!(Conversation::read("# nothing\n", &[]).is_err());
    }
}
