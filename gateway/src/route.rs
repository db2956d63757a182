//! Routes: a path, whose webhooks arrive there, and the application that they go to.

use std::{fmt, time::Duration};

use http::Uri;
use oncegate_runtime::{
    config::Checks,
    secret::{Secret, SecretSource, shown_url},
};

use crate::{
    config::Policy,
    enforcement::Switch,
    providers::{Provider, paystack::one_mode},
    signing::Signer,
};

/// One path for webhooks.
#[derive(Debug)]
pub(crate) struct Route {
    pub(crate) path: Box<str>,
    pub(crate) tenant: String,
    pub(crate) provider: Provider,
    pub(crate) secrets: Secrets,
    pub(crate) application: Application,
    pub(crate) policy: Policy,
    pub(crate) enforcement: Switch,
}

/// Secrets that may change.
#[derive(Debug, Clone)]
pub(crate) struct Secrets {
    /// Where they come from, to read them again.
    pub(crate) source: SecretSource,
    /// What was read at start.
    pub(crate) read: Vec<Secret>,
}

/// The application behind a route.
#[derive(Clone)]
pub(crate) struct Application {
    pub(crate) url: Uri,
    /// Signs what is delivered, when the application wants to verify the hop (G7).
    pub(crate) signer: Option<Signer>,
    /// The signer's secrets.
    pub(crate) signer_secrets: Option<Secrets>,
    /// How long it may take to answer.
    pub(crate) timeout: Duration,
    /// How long the lock on one of its events lasts: the time-out and a margin, at least (G8).
    pub(crate) lock_duration: Duration,
}

impl fmt::Debug for Application {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Application")
            // The query may hold a secret.
            .field("url", &shown_url(&self.url.to_string()))
            .field("timeout", &self.timeout)
            .field("lock_duration", &self.lock_duration)
            .finish_non_exhaustive()
    }
}

/// Refuses routes that would starve each other.
pub(crate) fn check(routes: &[Route], checks: &mut Checks) {
    for (index, later) in routes.iter().enumerate() {
        for earlier in &routes[..index] {
            if earlier.path == later.path {
                checks.problem("routes", format!("{} stands twice", later.path));
            }
            // G10: whichever route an event arrives on first completes it; for the other it is a duplicate.
            let same_events = earlier.tenant == later.tenant && earlier.provider.name() == later.provider.name();
            if same_events && earlier.application.url != later.application.url {
                checks.problem(
                    "routes",
                    format!(
                        "{} and {} share tenant {} and provider {}, but deliver to {} and {}: the second would never get an \
                         event; give them tenants of their own",
                        earlier.path,
                        later.path,
                        later.tenant,
                        later.provider.name(),
                        shown_url(&earlier.application.url.to_string()),
                        shown_url(&later.application.url.to_string()),
                    ),
                );
            }
            if same_events && later.provider.names_are_the_senders() && !shares_a_secret(earlier, later) {
                tracing::warn!(
                    first = &*earlier.path,
                    second = &*later.path,
                    tenant = later.tenant,
                    provider = later.provider.name(),
                    "two routes share a tenant and no secret: an event of one sender passes for the event with its name of the \
                     other; give them tenants of their own, if they are not of one account"
                );
            }
            // As within one list of secrets.
            let both = earlier.secrets.read.iter().chain(&later.secrets.read);
            if same_events && matches!(later.provider, Provider::Paystack(_)) && one_mode(both).is_err() {
                checks.problem(
                    "routes",
                    format!(
                        "{} and {} share tenant {}, but one has a key of Paystack's test mode and the other of live mode: a \
                         test event would pass for the payment with its reference; give them tenants of their own",
                        earlier.path, later.path, later.tenant,
                    ),
                );
            }
        }
    }
}

/// Whether one sender may be behind both.
fn shares_a_secret(one: &Route, other: &Route) -> bool {
    one.secrets.read.iter().any(|secret| other.secrets.read.contains(secret))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::{HeldStatus, InProgressStatus, OnRefusal, OnUnclear},
        enforcement::Enforcement,
        providers::stripe::{Stripe, TOLERANCE},
    };

    fn route(path: &str, tenant: &str, url: &'static str) -> Route {
        Route {
            path: path.into(),
            tenant: tenant.into(),
            provider: Provider::Stripe(Stripe::new(&[], TOLERANCE)),
            secrets: Secrets { source: SecretSource::Value("x".into()), read: Vec::new() },
            application: Application {
                url: Uri::from_static(url),
                signer: None,
                signer_secrets: None,
                timeout: Duration::from_secs(1),
                lock_duration: Duration::from_secs(3),
            },
            policy: Policy {
                in_progress: InProgressStatus::Conflict,
                held: HeldStatus::Unprocessable,
                refusal: OnRefusal::Retryable,
                unclear: OnUnclear::Retryable,
            },
            enforcement: Switch::new(Enforcement::Enforce),
        }
    }

    fn problems(routes: &[Route]) -> usize {
        let mut checks = Checks::new();
        check(routes, &mut checks);
        checks.finish().map_or_else(|problems| problems.iter().count(), |()| 0)
    }

    #[test]
    fn g10_one_tenant_and_provider_has_one_application() {
        let first = || route("/a", "t", "http://x/");
        assert_eq!(problems(&[first(), route("/b", "t", "http://y/")]), 1);
        assert_eq!(problems(&[first(), route("/b", "t", "http://x/")]), 0);
        assert_eq!(problems(&[first(), route("/b", "u", "http://y/")]), 0);
        assert_eq!(problems(&[first(), first()]), 1);
    }

    #[test]
    fn g10_no_message_and_no_debug_output_shows_the_query_of_an_application() {
        let routes = [route("/a", "t", "http://x/hook?key=hunter2"), route("/b", "t", "http://y/hook?key=hunter2")];
        let mut checks = Checks::new();
        check(&routes, &mut checks);
        let text = checks.finish().unwrap_err().to_string();
        assert!(text.contains("deliver to http://x/hook?*** and http://y/hook?***"), "{text}");
        for shown in [text, format!("{routes:?}")] {
            assert!(!shown.contains("hunter2"), "{shown}");
        }
    }
}
