//! Where Stats counts what happens to an event.

use crate::event::{Event, Time};

/// A tenant, a provider, and an hour. In this order: whoever writes several sorts them (unsorted ones deadlock, L3).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub(crate) tenant: String,
    pub(crate) provider: String,
    /// The full hour of the events' creation.
    pub(crate) hour: Time,
}

impl Place {
    /// Where events of this tenant and provider are counted that were created at `create_time`.
    pub(crate) fn at(tenant: &str, provider: &str, create_time: Time) -> Place {
        Place { tenant: tenant.to_owned(), provider: provider.to_owned(), hour: create_time.hour() }
    }

    /// Where an event is counted.
    pub(crate) fn of(event: &Event) -> Place {
        Place::at(&event.key.tenant, &event.key.provider, event.create_time)
    }
}
