//! The kinds of threads, told by the thread's name.

/// Threads that may do the same things.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ThreadKind {
    /// Waits for the others; filtered once they run.
    Main,
    /// Owns the machine and starts its threads.
    Control,
    /// Serves the API and starts query threads.
    HttpServer,
    /// Asks the machine for figures.
    ApiQuery,
    /// Writes events.
    EventMonitor,
    /// Runs the guest.
    Vcpu,
    /// Carries serial port input and output.
    Serial,
    /// Loads kernel and initramfs.
    PayloadLoader,
    /// Serves queues of the balloon.
    Balloon,
    /// Serves queues of a disk.
    Block,
    /// Serves queues of a network device.
    Net,
    /// Serves the queue of the random number device.
    Rng,
    /// Serves queues of the console.
    Console,
    /// Serves a device whose name, chosen by the user, does not tell its kind: what any device may do.
    Device,
}

impl ThreadKind {
    /// Every kind.
    pub const ALL: &[Self] = &[
        Self::Main,
        Self::Control,
        Self::HttpServer,
        Self::ApiQuery,
        Self::EventMonitor,
        Self::Vcpu,
        Self::Serial,
        Self::PayloadLoader,
        Self::Balloon,
        Self::Block,
        Self::Net,
        Self::Rng,
        Self::Console,
        Self::Device,
    ];

    /// The kind of the thread with this name. Total: a name nobody reserved is a device's.
    pub fn of_name(name: &str) -> Self {
        match name {
            crate::control::CONTROL_THREAD => Self::Control,
            crate::api::http::HTTP_THREAD => Self::HttpServer,
            crate::api::QUERY_THREAD => Self::ApiQuery,
            crate::event_monitor::EVENT_THREAD => Self::EventMonitor,
            "main" => Self::Main,
            "payload_loader" => Self::PayloadLoader,
            _ => Self::of_prefix(name),
        }
    }

    fn of_prefix(name: &str) -> Self {
        let numbered = |prefix: &str| {
            name.strip_prefix(prefix).is_some_and(|rest| {
                !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit())
            })
        };
        // Users' names cannot begin with two underscores, and generated ones begin with one.
        let prefixes = [
            ("__balloon", Self::Balloon),
            ("__rng", Self::Rng),
            ("__console", Self::Console),
            ("serial", Self::Serial),
        ];
        if numbered("vcpu") {
            return Self::Vcpu;
        }
        prefixes
            .into_iter()
            .find(|(prefix, _)| name.starts_with(prefix))
            .map_or_else(|| Self::of_generated_id(name), |(_, kind)| kind)
    }

    /// `_disk0`, `_disk0_q1`, `_net2_qp0`: the id is generated only if digits follow, otherwise a user chose it.
    fn of_generated_id(name: &str) -> Self {
        [("_disk", Self::Block), ("_net", Self::Net)]
            .into_iter()
            .find(|(prefix, _)| {
                name.strip_prefix(prefix)
                    .is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
            })
            .map_or(Self::Device, |(_, kind)| kind)
    }
}
