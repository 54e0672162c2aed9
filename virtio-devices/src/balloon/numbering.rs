//! The numbers of the balloon's queues.
//!
//! The standard gives each queue a fixed number (virtio 1.2 §5.5.2): statistics 2, hinting 3, reporting 4. Linux
//! numbers only the queues that it uses, without gaps (`vp_find_vqs` in drivers/virtio/virtio_pci_common.c): with
//! statistics and reporting but no hinting, reporting is 3. A driver does not announce its scheme, but the set of
//! enabled queues reveals it.

use super::spec::{
    VIRTIO_BALLOON_F_FREE_PAGE_HINT, VIRTIO_BALLOON_F_REPORTING, VIRTIO_BALLOON_F_STATS_VQ,
};

/// The role of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum QueueRole {
    Inflate,
    Deflate,
    Stats,
    Hint,
    Reporting,
}

/// The queues in their standard order, with the feature on which each depends. The position is the standard number.
const ROLES: [(QueueRole, u64); 5] = [
    (QueueRole::Inflate, 0),
    (QueueRole::Deflate, 0),
    (QueueRole::Stats, VIRTIO_BALLOON_F_STATS_VQ),
    (QueueRole::Hint, VIRTIO_BALLOON_F_FREE_PAGE_HINT),
    (QueueRole::Reporting, VIRTIO_BALLOON_F_REPORTING),
];

/// Maximum size of each queue. Drivers expect 128 for page frame numbers. Linux rejects reporting with fewer than 32
/// entries, and newer drivers put as many ranges in a report as the queue has entries. Numbers 2 and 3 mean different
/// queues in the two schemes, so all three get the same size.
pub(super) const QUEUE_SIZES: [u16; ROLES.len()] = [128, 128, 256, 256, 256];

/// Whether this number is the hinting queue under some set of features.
pub(super) fn may_be_hint(index: u16) -> bool {
    [0, VIRTIO_BALLOON_F_STATS_VQ].into_iter().any(|features| {
        let dense = Numbering::dense(features | VIRTIO_BALLOON_F_FREE_PAGE_HINT);
        dense.role(index) == Some(QueueRole::Hint)
    }) || Numbering::fixed(VIRTIO_BALLOON_F_FREE_PAGE_HINT).role(index) == Some(QueueRole::Hint)
}

/// The role of each queue number under one negotiated set of features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Numbering([Option<QueueRole>; ROLES.len()]);

impl Numbering {
    /// The numbering that matches the `enabled` queues, preferably Linux's.
    pub(super) fn of(features: u64, enabled: impl Iterator<Item = u16> + Clone) -> Self {
        let dense = Self::dense(features);
        let fixed = Self::fixed(features);
        if !dense.explains(enabled.clone()) && fixed.explains(enabled) {
            fixed
        } else {
            dense
        }
    }

    fn dense(features: u64) -> Self {
        let mut roles = [None; ROLES.len()];
        let negotiated = ROLES.iter().filter(|(_, bit)| features & bit == *bit);
        for (slot, (role, _)) in roles.iter_mut().zip(negotiated) {
            *slot = Some(*role);
        }
        Self(roles)
    }

    fn fixed(features: u64) -> Self {
        Self(ROLES.map(|(role, bit)| (features & bit == bit).then_some(role)))
    }

    fn explains(&self, mut enabled: impl Iterator<Item = u16>) -> bool {
        enabled.all(|index| self.role(index).is_some())
    }

    /// The role of the queue with this number; `None` if it was not negotiated.
    pub(super) fn role(&self, index: u16) -> Option<QueueRole> {
        self.0.get(usize::from(index)).copied().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATS: u64 = VIRTIO_BALLOON_F_STATS_VQ;
    const HINT: u64 = VIRTIO_BALLOON_F_FREE_PAGE_HINT;
    const REPORTING: u64 = VIRTIO_BALLOON_F_REPORTING;

    fn roles(features: u64, enabled: &[u16]) -> Vec<Option<QueueRole>> {
        let numbering = Numbering::of(features, enabled.iter().copied());
        enabled.iter().map(|at| numbering.role(*at)).collect()
    }

    #[test]
    fn numbering_of_linux_leaves_no_gaps() {
        for (features, index) in [
            (REPORTING, 2),
            (REPORTING | STATS, 3),
            (REPORTING | HINT, 3),
            (REPORTING | STATS | HINT, 4),
        ] {
            let enabled: Vec<u16> = (0..=index).collect();
            let last = roles(features, &enabled).pop().flatten();
            assert_eq!(last, Some(QueueRole::Reporting), "features {features:#x}");
        }
    }

    #[test]
    fn numbering_of_the_standard_is_recognised_by_its_gaps() {
        use QueueRole::{Deflate, Hint, Inflate, Reporting, Stats};
        let base = [Some(Inflate), Some(Deflate)];
        for (features, extra, expected) in [
            (REPORTING, vec![4], vec![Some(Reporting)]),
            (
                REPORTING | STATS,
                vec![2, 4],
                vec![Some(Stats), Some(Reporting)],
            ),
            (
                REPORTING | HINT,
                vec![3, 4],
                vec![Some(Hint), Some(Reporting)],
            ),
        ] {
            let enabled = [vec![0, 1], extra].concat();
            assert_eq!(
                roles(features, &enabled),
                [base.to_vec(), expected].concat()
            );
        }
    }

    #[test]
    fn hint_queue_is_number_two_or_three() {
        let numbers: Vec<u16> = (0..8).filter(|index| may_be_hint(*index)).collect();
        assert_eq!(numbers, [2, 3]);
    }

    #[test]
    fn queue_without_its_feature_has_no_role() {
        assert_eq!(roles(STATS, &[0, 1, 2, 3, 4])[3..], [None, None]);
        assert_eq!(Numbering::of(!0, 0..5).role(5), None);
    }
}
