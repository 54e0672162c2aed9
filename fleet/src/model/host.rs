//! A reading of the host's memory, huge pages, swap and pressure.

use serde::{Deserialize, Serialize};

use super::{Bytes, Fraction};

/// One reading of the host. The host is the machine or, if that is smaller, the control group in which the VMs run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HostFacts {
    /// When it was read, ms on the planner's clock.
    pub at_ms: u64,
    /// MemTotal of `/proc/meminfo`.
    pub total: Bytes,
    /// MemAvailable of `/proc/meminfo`.
    pub available: Bytes,
    /// The pool of huge pages, which is in neither of the two.
    #[serde(default)]
    pub pool: HugePool,
    /// The VMs' control group, if it has a limit; the sum if there are several.
    pub cgroup: Option<CgroupMemory>,
    /// Memory pressure of the machine or of the group, whichever is higher.
    pub pressure: Pressure,
    /// Swap space.
    pub swap_total: Bytes,
    /// Unused swap space.
    pub swap_free: Bytes,
    /// Memory read from swap, per second.
    pub swap_in_per_s: Bytes,
    /// Memory written to swap, per second.
    pub swap_out_per_s: Bytes,
}

/// The host's pool of huge pages. VMs in it neither use other memory nor return any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HugePool {
    /// Its size, including pages of every size.
    pub total: Bytes,
    /// Neither in use nor reserved by a mapping, of pages of the default size.
    pub free: Bytes,
    /// Reserved by mappings that have not touched it yet, of pages of the default size.
    #[serde(default)]
    pub reserved: Bytes,
    /// The default size of a page.
    #[serde(default)]
    pub page: Bytes,
}

impl HugePool {
    /// Memory that can be reserved while running VMs may still take `callable`. Memory that their mappings reserved is
    /// already not free. Not every VMM reserves, and if a guest finds the pool empty, its VMM is killed.
    pub fn firm_free(&self, callable: Bytes) -> Bytes {
        self.free - (callable - self.reserved)
    }
}

/// Figures of a memory control group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CgroupMemory {
    /// The lowest `memory.max` from the group up to the root.
    pub limit: Bytes,
    /// `memory.current`.
    pub current: Bytes,
    /// Memory that the kernel can drop without harm: `inactive_file` and `slab_reclaimable` of `memory.stat`.
    pub reclaimable: Bytes,
}

/// Pressure stall information for memory: the percentage of time in which tasks waited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Pressure {
    /// At least one task waited, mean of 10 s.
    pub some_avg10: f64,
    /// All tasks waited, mean of 10 s.
    pub full_avg10: f64,
    /// `total` of the line `some`, µs.
    pub some_total_us: u64,
    /// `total` of the line `full`, µs.
    pub full_total_us: u64,
}

impl HostFacts {
    /// Memory of the host. If the control group's limit is lower, it applies: admission by the machine's memory would
    /// lead to the group's out-of-memory killer.
    pub fn limit(&self) -> Bytes {
        match self.cgroup {
            Some(group) => group.limit.min(self.total),
            None => self.total,
        }
    }

    /// Memory that is available now without harm.
    pub fn available(&self) -> Bytes {
        match self.cgroup {
            Some(group) => self
                .available
                .min(group.limit - group.current + group.reclaimable.min(group.current)),
            None => self.available,
        }
    }

    /// Memory that the manager may hand out: the host's minus the reserve.
    pub fn usable(&self, reserve: Bytes) -> Bytes {
        self.limit() - reserve
    }

    /// Available memory above the reserve, as a fraction of the usable memory. The host's states depend on it.
    pub fn free_fraction(&self, reserve: Bytes) -> Fraction {
        Fraction((self.available() - reserve).ratio(self.usable(reserve)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> HostFacts {
        HostFacts {
            total: Bytes::gib(64),
            available: Bytes::gib(40),
            ..HostFacts::default()
        }
    }

    #[test]
    fn host_without_group_is_the_machine() {
        assert_eq!(host().limit(), Bytes::gib(64));
        assert_eq!(host().available(), Bytes::gib(40));
    }

    #[test]
    fn what_vms_may_still_take_of_the_pool_counts_once_whether_it_is_reserved_or_not() {
        let pool = |reserved| HugePool {
            free: Bytes::gib(20),
            reserved: Bytes::gib(reserved),
            ..HugePool::default()
        };
        let firm_free = |reserved, callable| pool(reserved).firm_free(Bytes::gib(callable));
        assert_eq!(firm_free(0, 8), Bytes::gib(12));
        assert_eq!(firm_free(8, 8), Bytes::gib(20));
        assert_eq!(firm_free(3, 8), Bytes::gib(15));
        // Other processes reserve as well.
        assert_eq!(firm_free(9, 8), Bytes::gib(20));
        assert_eq!(firm_free(0, 30), Bytes::ZERO);
    }

    #[test]
    fn group_smaller_than_the_machine_is_the_host() {
        let mut host = host();
        host.cgroup = Some(CgroupMemory {
            limit: Bytes::gib(8),
            current: Bytes::gib(7),
            reclaimable: Bytes::gib(1),
        });
        assert_eq!(host.limit(), Bytes::gib(8));
        assert_eq!(host.available(), Bytes::gib(2));
        assert_eq!(host.usable(Bytes::gib(1)), Bytes::gib(7));
    }

    #[test]
    fn machine_short_of_memory_counts_inside_a_roomy_group() {
        let mut host = host();
        host.available = Bytes::gib(1);
        host.cgroup = Some(CgroupMemory {
            limit: Bytes::gib(32),
            ..CgroupMemory::default()
        });
        assert_eq!(host.available(), Bytes::gib(1));
    }
}
