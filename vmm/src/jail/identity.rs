//! The user and groups as which the VMM runs.

use std::fs;
use std::path::Path;

use rustix::process::{DumpableBehavior, Gid, Uid, set_dumpable_behavior};
use rustix::thread::{self, CapabilitySet, CapabilitySets};

use super::JailError;

const USERS: &str = "/etc/passwd";
const GROUPS: &str = "/etc/group";

/// A user with its groups.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Identity {
    uid: Uid,
    gid: Gid,
    /// The further groups, for example that of `/dev/kvm`.
    groups: Vec<Gid>,
}

impl Identity {
    /// Finds names in `/etc/passwd` and `/etc/group`. `user` and `group` may be numbers without an entry.
    pub(super) fn find(user: &str, group: Option<&str>) -> Result<Self, JailError> {
        Self::find_in(user, group, &read(USERS)?, &read(GROUPS)?)
    }

    fn find_in(
        user: &str,
        group: Option<&str>,
        users: &str,
        groups: &str,
    ) -> Result<Self, JailError> {
        let number = number_of(user);
        let entry = entries(users).find(|entry| match number {
            Some(number) => entry.number == number,
            None => entry.name == user,
        });
        let uid = match (number, &entry) {
            (Some(number), _) => number,
            (None, Some(entry)) => entry.number,
            (None, None) => return Err(unknown(user, USERS)),
        };
        let gid = match (group, &entry) {
            (Some(group), _) => group_number(group, groups)?,
            (None, Some(entry)) => {
                let group = entry.rest.split(':').next();
                let group = group.and_then(number_of);
                group.ok_or(JailError::NoGroup { uid })?
            }
            (None, None) => return Err(JailError::NoGroup { uid }),
        };
        let is_member = |group: &Entry<'_>| {
            let mut members = group.rest.split(',');
            entry
                .as_ref()
                .is_some_and(|entry| members.any(|member| member == entry.name))
        };
        let further = entries(groups).filter(is_member);
        Ok(Self {
            uid: Uid::from_raw(uid),
            gid: Gid::from_raw(gid),
            groups: further.map(|group| Gid::from_raw(group.number)).collect(),
        })
    }

    /// The owner of files that are created in advance.
    pub(super) fn owner(&self) -> (Uid, Gid) {
        (self.uid, self.gid)
    }

    /// Changes the calling thread's user and groups, and drops all capabilities.
    pub(super) fn assume(&self) -> Result<(), JailError> {
        let failed = |what: &'static str| move |source| JailError::failed(what, source);
        let own = thread::capabilities(None).map_err(failed("read the capabilities"))?;
        let (uid, gid) = (self.uid, self.gid);
        if own.effective.contains(CapabilitySet::SETPCAP) {
            // Kernels know different numbers of them.
            let all = (0..u64::BITS).map(|bit| CapabilitySet::from_bits_retain(1 << bit));
            for capability in all {
                if thread::capability_is_in_bounding_set(capability) == Ok(true) {
                    thread::remove_capability_from_bounding_set(capability)
                        .map_err(failed("drop capabilities from the bounding set"))?;
                }
            }
        }
        let changes = CapabilitySet::SETUID | CapabilitySet::SETGID;
        if own.effective.contains(changes) {
            thread::set_thread_groups(&self.groups).map_err(failed("set the groups"))?;
            thread::set_thread_res_gid(gid, gid, gid).map_err(failed("set the group"))?;
            thread::set_thread_res_uid(uid, uid, uid).map_err(failed("set the user"))?;
        } else if (rustix::process::geteuid(), rustix::process::getegid()) != (uid, gid) {
            let (uid, gid) = (uid.as_raw(), gid.as_raw());
            return Err(JailError::Unprivileged { uid, gid });
        }
        thread::clear_ambient_capability_set().map_err(failed("clear ambient capabilities"))?;
        let none = CapabilitySet::empty();
        let none = CapabilitySets {
            effective: none,
            permitted: none,
            inheritable: none,
        };
        thread::set_capabilities(None, none).map_err(failed("drop the capabilities"))?;
        // Otherwise, other processes of this user could trace the VMM.
        set_dumpable_behavior(DumpableBehavior::NotDumpable)
            .map_err(failed("make the process not dumpable"))
    }
}

/// A line of one of the files.
struct Entry<'a> {
    name: &'a str,
    number: u32,
    rest: &'a str,
}

/// The lines `name:password:number:rest`, without malformed ones.
fn entries(text: &str) -> impl Iterator<Item = Entry<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.splitn(4, ':');
        let (name, _password) = (fields.next()?, fields.next()?);
        let number = number_of(fields.next()?)?;
        let rest = fields.next()?;
        Some(Entry { name, number, rest })
    })
}

/// The number of a user or group. The kernel reads -1 as "unchanged".
fn number_of(text: &str) -> Option<u32> {
    text.parse().ok().filter(|number| *number != u32::MAX)
}

fn group_number(group: &str, groups: &str) -> Result<u32, JailError> {
    let named = |entry: &Entry<'_>| entry.name == group;
    let number = number_of(group).or_else(|| entries(groups).find(named).map(|entry| entry.number));
    number.ok_or_else(|| unknown(group, GROUPS))
}

fn unknown(name: &str, file: &str) -> JailError {
    JailError::Unknown {
        name: name.to_owned(),
        path: file.into(),
    }
}

fn read(path: &str) -> Result<String, JailError> {
    let bytes = fs::read(path).map_err(|source| JailError::Accounts {
        path: Path::new(path).to_owned(),
        source,
    })?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const SOME_USERS: &str =
        "root:x:0:0:root:/root:/bin/sh\n+nis\nvm:x:990:991::/:/usr/sbin/nologin\n";
    const SOME_GROUPS: &str =
        "root:x:0:\nvm:x:991:\nkvm:x:104:qemu,vm\nbroken:x:many:vm\ndisk:x:6:vmware,root\n";

    fn find(user: &str, group: Option<&str>) -> Result<(u32, u32, Vec<u32>), JailError> {
        let found = Identity::find_in(user, group, SOME_USERS, SOME_GROUPS)?;
        let groups = found.groups.iter().map(|group| group.as_raw()).collect();
        Ok((found.uid.as_raw(), found.gid.as_raw(), groups))
    }

    #[test]
    fn names_and_numbers_of_a_user_bring_its_groups() {
        assert_eq!(find("vm", None).unwrap(), (990, 991, vec![104]));
        assert_eq!(find("990", None).unwrap(), (990, 991, vec![104]));
        assert_eq!(find("vm", Some("kvm")).unwrap(), (990, 104, vec![104]));
        assert_eq!(find("vm", Some("7")).unwrap(), (990, 7, vec![104]));
        assert_eq!(find("5000", Some("104")).unwrap(), (5000, 104, vec![]));
    }

    #[test]
    fn unknown_users_and_groups_are_named() {
        let text = |user, group| find(user, group).unwrap_err().to_string();
        assert!(text("nobody-here", None).contains("/etc/passwd has no entry for \"nobody-here\""));
        assert!(text("vm", Some("audio")).contains("/etc/group has no entry for \"audio\""));
        assert!(text("5000", None).contains("add --group"));
        assert!(text("4294967295", None).contains("no entry"));
        assert!(text("vm", Some("4294967295")).contains("no entry"));
        assert!(text("-1", None).contains("no entry"));
        assert!(text("", None).contains("no entry"));
    }
}
