//! Turns the calls that a kind of threads may make into a BPF program.
//!
//! The kernel translates the program for every thread that installs it, and then runs it for every call that a thread
//! may make so far, which delays the start of a VM. The program is therefore short:
//!
//! ```text
//! other architecture ──────────► the process ends
//! bisection of call numbers ──► group of a few calls ─► call without conditions ─► allowed
//!                                                    ├► call with conditions ──► alternatives, in their order
//!                                                    └► any other ────────────► the effect of a forbidden call
//! ```

use std::collections::BTreeMap;

use seccompiler::{BpfProgram, SeccompAction, sock_filter};

use hypervisor::kick;

use super::calls::{Condition, Test};

/// The alternatives for each system call. All conditions of an alternative must hold; one without conditions allows any
/// arguments.
pub(super) type Allowed = BTreeMap<i64, Vec<Vec<Condition>>>;

/// Calls that are compared one by one.
const GROUP: usize = 8;
/// Values that are compared after one load. A conditional jump skips at most 255 instructions.
const VALUES_MAX: usize = 200;

// From linux/bpf_common.h, with the operands that are used here.
const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const IF_EQUAL: u16 = 0x15;
const IF_AT_LEAST: u16 = 0x35;
const RETURN: u16 = 0x06;

// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

fn statement(code: u16, k: u32) -> sock_filter {
    sock_filter {
        code,
        jt: 0,
        jf: 0,
        k,
    }
}

/// Skips `then` instructions if the condition holds, else `otherwise`.
fn branch(code: u16, k: u32, then: u8, otherwise: u8) -> sock_filter {
    sock_filter {
        code,
        jt: then,
        jf: otherwise,
        k,
    }
}

fn skip(instructions: usize) -> sock_filter {
    statement(JUMP, instructions as u32)
}

fn answer(action: &SeccompAction) -> sock_filter {
    statement(RETURN, action.clone().into())
}

fn allow() -> sock_filter {
    answer(&SeccompAction::Allow)
}

/// The program that allows these calls; any other has the effect `forbidden`.
pub(super) fn program(allowed: &Allowed, forbidden: &SeccompAction) -> BpfProgram {
    let calls: Vec<(u32, &[Vec<Condition>])> = allowed
        .iter()
        .map(|(number, alternatives)| (*number as u32, &alternatives[..]))
        .collect();
    let mut program = vec![
        statement(LOAD, ARCHITECTURE),
        branch(IF_EQUAL, AUDIT_ARCH_X86_64, 1, 0),
        answer(&SeccompAction::KillProcess),
        statement(LOAD, NUMBER),
    ];
    program.extend(bisection(&calls, forbidden));
    program
}

/// `calls` are in ascending order.
fn bisection(calls: &[(u32, &[Vec<Condition>])], forbidden: &SeccompAction) -> BpfProgram {
    if calls.len() <= GROUP {
        return group(calls, forbidden);
    }
    let (low, high) = calls.split_at(calls.len() / 2);
    let first = high[0].0;
    let low = bisection(low, forbidden);
    let mut program = vec![branch(IF_AT_LEAST, first, 0, 1), skip(low.len())];
    program.extend(low);
    program.extend(bisection(high, forbidden));
    program
}

fn group(calls: &[(u32, &[Vec<Condition>])], forbidden: &SeccompAction) -> BpfProgram {
    let is_free = |alternatives: &[Vec<Condition>]| alternatives.iter().any(Vec::is_empty);
    let mut program = BpfProgram::new();
    for (number, alternatives) in calls.iter().filter(|call| !is_free(call.1)) {
        let tests = tests(alternatives, forbidden);
        program.push(branch(IF_EQUAL, *number, 0, 1));
        // Over the next instruction to the tests, or over the tests.
        program.push(skip(1));
        program.push(skip(tests.len()));
        program.extend(tests);
    }
    let free = calls.iter().filter(|call| is_free(call.1));
    let numbers: Vec<u32> = free.map(|call| call.0).collect();
    for (at, number) in numbers.iter().enumerate() {
        let behind = numbers.len() - at;
        program.push(branch(IF_EQUAL, *number, behind as u8, 0));
    }
    program.extend([answer(forbidden), allow()]);
    program
}

/// Allows the call if all conditions of an alternative hold.
fn tests(alternatives: &[Vec<Condition>], forbidden: &SeccompAction) -> BpfProgram {
    let mut program = BpfProgram::new();
    let kind = |alternative: &Vec<Condition>| match &alternative[..] {
        [condition] => value(condition.test).map(|_| condition.argument),
        _ => None,
    };
    for same in alternatives.chunk_by(|one, next| kind(one).is_some() && kind(one) == kind(next)) {
        match kind(&same[0]) {
            Some(argument) => {
                for part in same.chunks(VALUES_MAX) {
                    program.push(load(argument));
                    for (at, alternative) in part.iter().enumerate() {
                        let value = value(alternative[0].test).unwrap_or_default();
                        program.push(branch(IF_EQUAL, value, (part.len() - at) as u8, 0));
                    }
                    program.extend([skip(1), allow()]);
                }
            }
            None => program.extend(all_of(&same[0])),
        }
    }
    program.push(answer(forbidden));
    program
}

/// Allows the call if all conditions hold; otherwise continues behind.
fn all_of(conditions: &[Condition]) -> BpfProgram {
    let mut program = BpfProgram::from([allow()]);
    for condition in conditions.iter().rev() {
        let behind = program.len() as u8;
        let mut test = BpfProgram::from([load(condition.argument)]);
        test.extend(match condition.test {
            Test::IsNot(value) => vec![branch(IF_EQUAL, value as u32, behind, 0)],
            Test::Without(bits) => {
                vec![statement(AND, bits as u32), branch(IF_EQUAL, 0, 0, behind)]
            }
            Test::With(bits) => vec![
                statement(AND, bits as u32),
                branch(IF_EQUAL, bits as u32, 0, behind),
            ],
            is => vec![branch(IF_EQUAL, value(is).unwrap_or_default(), 0, behind)],
        });
        test.extend(program);
        program = test;
    }
    program
}

/// The value that the test requires, if it requires one.
fn value(test: Test) -> Option<u32> {
    match test {
        Test::Is(value) => Some(value as u32),
        Test::OwnProcess => Some(std::process::id()),
        Test::KickSignal => Some(kick::signal().unsigned_abs()),
        Test::IsNot(_) | Test::Without(_) | Test::With(_) => None,
    }
}

/// The kernel uses only the lower half of the argument.
fn load(argument: u8) -> sock_filter {
    statement(LOAD, ARGUMENTS + 8 * u32::from(argument))
}
