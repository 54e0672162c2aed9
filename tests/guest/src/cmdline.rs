//! The parameters of the guest's init on the kernel command line.
//!
//! `guest.run=` carries a shell script in base64, because the kernel splits at blanks, and a VMM may change quotes.

/// The action after the script has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    PowerOff,
    Reboot,
    Stay,
}

/// The parsed `guest.*` parameters.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) script: Option<Vec<u8>>,
    pub(crate) end: End,
    /// A disk with a separate system, with which the guest continues.
    pub(crate) root: Option<String>,
}

/// Reads `guest.run=`, `guest.end=` and `guest.root=`; anything else on the line is the kernel's.
pub(crate) fn parse(line: &str) -> Result<Request, String> {
    let mut request = Request {
        script: None,
        end: End::PowerOff,
        root: None,
    };
    for word in line.split_ascii_whitespace() {
        if let Some(text) = word.strip_prefix("guest.run=") {
            request.script = Some(base64(text).ok_or("guest.run= is no base64")?);
        } else if let Some(text) = word.strip_prefix("guest.root=") {
            request.root = Some(text.into());
        } else if let Some(text) = word.strip_prefix("guest.end=") {
            request.end = match text {
                "poweroff" => End::PowerOff,
                "reboot" => End::Reboot,
                "stay" => End::Stay,
                _ => return Err(format!("guest.end={text}: poweroff, reboot or stay")),
            };
        }
    }
    Ok(request)
}

/// Decodes standard or URL-safe base64; padding is optional.
fn base64(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() * 3 / 4);
    let (mut bits, mut count) = (0u32, 0);
    for byte in text.trim_end_matches('=').bytes() {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' | b'-' => 62,
            b'/' | b'_' => 63,
            _ => return None,
        };
        bits = (bits << 6) | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
            bits &= (1 << count) - 1;
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cmdline_without_request_powers_off_without_script() {
        let request = parse("console=ttyS0 quiet").unwrap();
        assert_eq!(request.script, None);
        assert_eq!(request.end, End::PowerOff);
    }

    #[test]
    fn cmdline_with_script_decodes_it() {
        let line = "quiet guest.run=ZWNobyBoaQ== guest.end=stay guest.root=/dev/vda";
        let request = parse(line).unwrap();
        assert_eq!(request.root.as_deref(), Some("/dev/vda"));
        assert_eq!(request.script.as_deref(), Some(&b"echo hi"[..]));
        assert_eq!(request.end, End::Stay);
    }

    #[test]
    fn cmdline_with_nonsense_is_refused() {
        assert!(parse("guest.run=%%%").is_err());
        assert!(parse("guest.end=later").is_err());
    }

    #[test]
    fn base64_of_every_remainder_is_decoded() {
        assert_eq!(base64("").unwrap(), b"");
        assert_eq!(base64("YQ").unwrap(), b"a");
        assert_eq!(base64("YWI=").unwrap(), b"ab");
        assert_eq!(base64("YWJj").unwrap(), b"abc");
        assert_eq!(base64("__-_").unwrap(), [0xff, 0xff, 0xbf]);
    }
}
