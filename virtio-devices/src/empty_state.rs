//! Saved states of configuration halves that a driver cannot change.

/// Declares such a state.
macro_rules! empty_state {
    ($(#[$about:meta])* $state:ident = $part:ident) => {
        $(#[$about])*
        #[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct $state {}

        impl state::State for $state {
            const PART: state::Part = state::parts::$part;
        }
    };
}
pub(crate) use empty_state;

/// Defines the methods of `VirtioDevice` that save and restore such a state.
macro_rules! saves_empty_state {
    ($state:ident) => {
        fn state(&self) -> state::Saved {
            state::Saved::of(&$state {})
        }

        fn restore(&mut self, state: &state::Saved) -> Result<(), state::StateError> {
            state.read().map(|$state {}| ())
        }
    };
}
pub(crate) use saves_empty_state;
