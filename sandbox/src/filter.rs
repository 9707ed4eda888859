//! The system call filter: no set-user-id bits, no extended attributes.
//!
//! A builder that leaves a set-user-id file behind lends its build user to whoever finds it, and
//! extended attributes (access lists among them) are no part of an archive. The reference refuses
//! `chmod` and its kin with `EPERM`, and the attribute calls with `ENOTSUP` (building, rule 9.13);
//! this filter also covers other ways to make such a file: `open`, `creat` and `mknod` with
//! the bits in their mode, `openat2` and `io_uring`, whose modes no filter can see, and which are
//! therefore missing (`ENOSYS`: programs fall back).
//!
//! One program serves every architecture: a 64-bit kernel runs 32-bit programs too, whose calls
//! have other numbers. An architecture that is not in the table is *let through*: it is none that
//! the kernel of a known one offers.

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;
const ENOTSUP: u32 = 95;

/// Set-user-id and set-group-id.
const SET_ID: u32 = 0o6000;
/// `O_CREAT` on every architecture of the table.
const O_CREAT: u32 = 0o100;
/// The bit of `O_TMPFILE` that means it.
const O_TMPFILE: u32 = 0o20_000_000;
/// Marks the x32 calls of `x86_64`.
const X32: u32 = 0x4000_0000;

/// An instruction of the kernel's classic filter machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    pub code: u16,
    /// How many instructions to skip if the condition holds, and if not.
    pub yes: u8,
    pub no: u8,
    pub k: u32,
}

const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const IF_EQUAL: u16 = 0x15;
const IF_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;

const ALLOW: u32 = 0x7fff_0000;
const ERRNO: u32 = 0x0005_0000;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
/// The lower half of an argument; all architectures of the table are little-endian.
const fn argument(index: u32) -> u32 {
    16 + 8 * index
}

/// What is to become of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// `EPERM` if this argument, a mode, has a set-id bit.
    Mode(u32),
    /// The same, if the flags in the first argument of the two make a file.
    OpenMode { flags: u32, mode: u32 },
    /// `ENOTSUP`.
    Unsupported,
    /// `ENOSYS`.
    Missing,
}

/// The calls of an architecture that have a rule.
pub struct Architecture {
    /// `AUDIT_ARCH_*`.
    pub audit: u32,
    /// Bits of the number that do not count.
    pub ignored: u32,
    pub calls: &'static [(u32, Rule)],
}

/// Calls newer than 2019 have one number everywhere.
const OPENAT2: (u32, Rule) = (437, Rule::Missing);
const IO_URING_SETUP: (u32, Rule) = (425, Rule::Missing);
const FCHMODAT2: (u32, Rule) = (452, Rule::Mode(2));
const SETXATTRAT: (u32, Rule) = (463, Rule::Unsupported);
const GETXATTRAT: (u32, Rule) = (464, Rule::Unsupported);

/// `open`, whose flags and mode follow the path.
const OPEN: Rule = Rule::OpenMode { flags: 1, mode: 2 };
/// `openat`, where a descriptor comes first.
const OPENAT: Rule = Rule::OpenMode { flags: 2, mode: 3 };

pub const ARCHITECTURES: &[Architecture] = &[
    // x86_64 and x32
    Architecture {
        audit: 0xc000_003e,
        ignored: X32,
        calls: &[
            (2, OPEN),
            (85, Rule::Mode(1)),      // creat
            (90, Rule::Mode(1)),      // chmod
            (91, Rule::Mode(1)),      // fchmod
            (133, Rule::Mode(1)),     // mknod
            (188, Rule::Unsupported), // setxattr, lsetxattr, fsetxattr
            (189, Rule::Unsupported),
            (190, Rule::Unsupported),
            (191, Rule::Unsupported), // getxattr, lgetxattr, fgetxattr
            (192, Rule::Unsupported),
            (193, Rule::Unsupported),
            (257, OPENAT),
            (259, Rule::Mode(2)), // mknodat
            (268, Rule::Mode(2)), // fchmodat
            IO_URING_SETUP,
            OPENAT2,
            FCHMODAT2,
            SETXATTRAT,
            GETXATTRAT,
        ],
    },
    // i386
    Architecture {
        audit: 0x4000_0003,
        ignored: 0,
        calls: &[
            (5, OPEN),
            (8, Rule::Mode(1)),       // creat
            (14, Rule::Mode(1)),      // mknod
            (15, Rule::Mode(1)),      // chmod
            (94, Rule::Mode(1)),      // fchmod
            (226, Rule::Unsupported), // setxattr, lsetxattr, fsetxattr
            (227, Rule::Unsupported),
            (228, Rule::Unsupported),
            (229, Rule::Unsupported), // getxattr, lgetxattr, fgetxattr
            (230, Rule::Unsupported),
            (231, Rule::Unsupported),
            (295, OPENAT),
            (297, Rule::Mode(2)), // mknodat
            (306, Rule::Mode(2)), // fchmodat
            IO_URING_SETUP,
            OPENAT2,
            FCHMODAT2,
            SETXATTRAT,
            GETXATTRAT,
        ],
    },
    // aarch64
    Architecture { audit: 0xc000_00b7, ignored: 0, calls: GENERIC },
    // riscv64
    Architecture { audit: 0xc000_00f3, ignored: 0, calls: GENERIC },
    // arm
    Architecture {
        audit: 0x4000_0028,
        ignored: 0,
        calls: &[
            (5, OPEN),
            (8, Rule::Mode(1)),       // creat
            (14, Rule::Mode(1)),      // mknod
            (15, Rule::Mode(1)),      // chmod
            (94, Rule::Mode(1)),      // fchmod
            (226, Rule::Unsupported), // setxattr, lsetxattr, fsetxattr
            (227, Rule::Unsupported),
            (228, Rule::Unsupported),
            (229, Rule::Unsupported), // getxattr, lgetxattr, fgetxattr
            (230, Rule::Unsupported),
            (231, Rule::Unsupported),
            (322, OPENAT),
            (324, Rule::Mode(2)), // mknodat
            (333, Rule::Mode(2)), // fchmodat
            IO_URING_SETUP,
            OPENAT2,
            FCHMODAT2,
            SETXATTRAT,
            GETXATTRAT,
        ],
    },
];

/// The numbers that newer architectures share.
const GENERIC: &[(u32, Rule)] = &[
    (5, Rule::Unsupported), // setxattr, lsetxattr, fsetxattr
    (6, Rule::Unsupported),
    (7, Rule::Unsupported),
    (8, Rule::Unsupported), // getxattr, lgetxattr, fgetxattr
    (9, Rule::Unsupported),
    (10, Rule::Unsupported),
    (33, Rule::Mode(2)), // mknodat
    (52, Rule::Mode(1)), // fchmod
    (53, Rule::Mode(2)), // fchmodat
    (56, OPENAT),
    IO_URING_SETUP,
    OPENAT2,
    FCHMODAT2,
    SETXATTRAT,
    GETXATTRAT,
];

const fn step(code: u16, k: u32) -> Instruction {
    Instruction { code, yes: 0, no: 0, k }
}

const fn test(code: u16, k: u32, yes: u8, no: u8) -> Instruction {
    Instruction { code, yes, no, k }
}

/// The rules come in two programs, both of which must let a call pass. The kernel takes some time
/// over the many instructions of the first: it is installed once, in the process from which builders
/// are forked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// What can be in force from the beginning.
    Early,
    /// What setting a sandbox up needs itself (`openat2`): missing calls.
    Late,
}

impl Part {
    fn holds(self, rule: Rule) -> bool {
        (self == Self::Late) == (rule == Rule::Missing)
    }
}

/// A whole program: a block for each architecture, in it a block for each call.
pub fn program(part: Part) -> Vec<Instruction> {
    let mut all = vec![step(LOAD, ARCH)];
    for architecture in ARCHITECTURES {
        let block = architecture_block(architecture, part);
        let len = u32::try_from(block.len()).expect("a few hundred");
        // Conditional jumps reach 255 far, so a block is skipped by an unconditional one.
        all.extend([test(IF_EQUAL, architecture.audit, 1, 0), step(JUMP, len)]);
        all.extend(block);
    }
    all.push(step(RETURN, ALLOW));
    all
}

fn architecture_block(architecture: &Architecture, part: Part) -> Vec<Instruction> {
    let mut block = vec![step(LOAD, NUMBER)];
    if architecture.ignored != 0 {
        block.push(step(AND, !architecture.ignored));
    }
    for &(number, rule) in architecture.calls.iter().filter(|(_, rule)| part.holds(*rule)) {
        let verdict = rule_block(rule);
        let len = u8::try_from(verdict.len()).expect("a few");
        block.push(test(IF_EQUAL, number, 0, len));
        block.extend(verdict);
    }
    block.push(step(RETURN, ALLOW));
    block
}

/// Always returns.
fn rule_block(rule: Rule) -> Vec<Instruction> {
    let verdict = [step(RETURN, ERRNO | EPERM), step(RETURN, ALLOW)];
    match rule {
        Rule::Mode(mode) => {
            [vec![step(LOAD, argument(mode)), test(IF_ANY_BIT, SET_ID, 0, 1)], verdict.to_vec()].concat()
        }
        Rule::OpenMode { flags, mode } => [
            vec![
                step(LOAD, argument(flags)),
                test(IF_ANY_BIT, O_CREAT | O_TMPFILE, 0, 3),
                step(LOAD, argument(mode)),
                test(IF_ANY_BIT, SET_ID, 0, 1),
            ],
            verdict.to_vec(),
        ]
        .concat(),
        Rule::Unsupported => vec![step(RETURN, ERRNO | ENOTSUP)],
        Rule::Missing => vec![step(RETURN, ERRNO | ENOSYS)],
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Runs a program as the kernel does.
    fn run(program: &[Instruction], arch: u32, number: u32, arguments: [u64; 6]) -> u32 {
        let mut data = Vec::new();
        data.extend(number.to_le_bytes());
        data.extend(arch.to_le_bytes());
        data.extend(0_u64.to_le_bytes());
        data.extend(arguments.iter().flat_map(|a| a.to_le_bytes()));
        let (mut at, mut a) = (0, 0_u32);
        loop {
            let i = program[at];
            at += 1;
            match i.code {
                LOAD => a = u32::from_le_bytes(data[i.k as usize..][..4].try_into().unwrap()),
                AND => a &= i.k,
                JUMP => at += i.k as usize,
                IF_EQUAL => at += usize::from(if a == i.k { i.yes } else { i.no }),
                IF_ANY_BIT => at += usize::from(if a & i.k != 0 { i.yes } else { i.no }),
                RETURN => return i.k,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    /// What comes of a call that both have seen.
    fn run_both(arch: u32, number: u32, arguments: [u64; 6]) -> u32 {
        let verdicts = [Part::Early, Part::Late].map(|part| run(&program(part), arch, number, arguments));
        verdicts.into_iter().find(|verdict| *verdict != ALLOW).unwrap_or(ALLOW)
    }

    /// What the rule says, said directly.
    fn expected(rule: Rule, arguments: [u64; 6]) -> u32 {
        let low = |index: u32| u32::try_from(arguments[index as usize] & 0xffff_ffff).unwrap();
        match rule {
            Rule::Mode(mode) if low(mode) & SET_ID != 0 => ERRNO | EPERM,
            Rule::OpenMode { flags, mode } if low(flags) & (O_CREAT | O_TMPFILE) != 0 && low(mode) & SET_ID != 0 => {
                ERRNO | EPERM
            }
            Rule::Mode(_) | Rule::OpenMode { .. } => ALLOW,
            Rule::Unsupported => ERRNO | ENOTSUP,
            Rule::Missing => ERRNO | ENOSYS,
        }
    }

    proptest! {
        /// Each call has its own rule's answer, every other call passes, whatever the arguments.
        #[test]
        fn calls_get_what_their_rule_says(
            which in 0..ARCHITECTURES.len(),
            number in prop_oneof![0_u32..600, any::<u32>()],
            x32 in any::<bool>(),
            arguments in proptest::array::uniform6(prop_oneof![any::<u64>(), 0_u64..0o10000, Just(0o4755), Just(0o101)]),
        ) {
            let architecture = &ARCHITECTURES[which];
            let sent = if x32 { number | architecture.ignored } else { number };
            let rule = architecture.calls.iter().find(|(n, _)| *n == sent & !architecture.ignored);
            let expected = rule.map_or(ALLOW, |(_, rule)| expected(*rule, arguments));
            prop_assert_eq!(run_both(architecture.audit, sent, arguments), expected);
        }
    }

    /// A kernel of another kind is not harmed.
    #[test]
    fn unknown_architectures_pass() {
        assert_eq!(run_both(0x1234_5678, 90, [0, 0o4755, 0, 0, 0, 0]), ALLOW);
    }

    #[test]
    fn the_programs_are_such_that_the_kernel_takes() {
        for part in [Part::Early, Part::Late] {
            let program = program(part);
            assert!(program.len() <= 4096, "{}", program.len());
            for (at, i) in program.iter().enumerate() {
                let reach = match i.code {
                    JUMP => i.k as usize,
                    IF_EQUAL | IF_ANY_BIT => usize::from(i.yes.max(i.no)),
                    RETURN => continue,
                    _ => 0,
                };
                assert!(at + 1 + reach < program.len(), "instruction {at} jumps out");
            }
        }
    }

    /// The numbers, against those that the C library knows for the machine at hand.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn numbers_are_those_of_the_c_library() {
        let calls = ARCHITECTURES[0].calls;
        let rule = |number: libc::c_long| calls.iter().find(|(n, _)| libc::c_long::from(*n) == number).map(|(_, r)| *r);
        assert_eq!(rule(libc::SYS_open), Some(OPEN));
        assert_eq!(rule(libc::SYS_openat), Some(OPENAT));
        for number in [libc::SYS_creat, libc::SYS_chmod, libc::SYS_fchmod, libc::SYS_mknod] {
            assert_eq!(rule(number), Some(Rule::Mode(1)));
        }
        for number in [libc::SYS_mknodat, libc::SYS_fchmodat, libc::SYS_fchmodat2] {
            assert_eq!(rule(number), Some(Rule::Mode(2)));
        }
        let set = [libc::SYS_setxattr, libc::SYS_lsetxattr, libc::SYS_fsetxattr];
        let get = [libc::SYS_getxattr, libc::SYS_lgetxattr, libc::SYS_fgetxattr];
        for number in set.into_iter().chain(get) {
            assert_eq!(rule(number), Some(Rule::Unsupported));
        }
        assert_eq!(rule(libc::SYS_openat2), Some(Rule::Missing));
        assert_eq!(rule(libc::SYS_io_uring_setup), Some(Rule::Missing));
        assert_eq!(calls.len(), 19);
    }
}
