//! Limits calls per second and tenant, so that one tenant's flood does not affect everybody.
//!
//! It applies to calls that claim, list or count, but not to those that extend or end work already granted: refusing a Mark
//! or an extension would cost a second attempt at a payment.

use std::{num::NonZeroU32, time::Duration};

use oncegate_api::reason;
use oncegate_runtime::buckets::Buckets;
use tonic::{Code, Status};

use super::status::retryable;

/// How many tenants can have a bucket of their own at the same time.
const TENANTS_MAX: usize = 10_000;

/// The tenants' buckets.
pub(super) struct TenantQuota {
    buckets: Buckets<String>,
}

impl TenantQuota {
    /// Allows this many calls a second, and as large a burst.
    pub(super) fn new(calls_per_second: NonZeroU32) -> Self {
        Self { buckets: Buckets::new(calls_per_second, Duration::from_secs(1), TENANTS_MAX) }
    }

    /// Takes a call from the tenant's bucket.
    pub(super) fn take(&self, tenant: &str) -> Result<(), Status> {
        self.buckets.take(tenant).map_err(|wait| {
            let wait = wait.max(Duration::from_millis(1));
            let message = format!("the tenant {tenant:?} has used up its calls per second");
            retryable(Code::ResourceExhausted, reason::QUOTA_EXCEEDED, message, wait)
        })
    }
}

#[cfg(test)]
mod tests {
    use tonic_types::StatusExt as _;

    use super::*;

    #[test]
    fn a_tenant_uses_up_its_own_quota_and_nobody_elses() {
        let quota = TenantQuota::new(NonZeroU32::new(3).expect("not zero"));
        assert!((0..3).all(|_| quota.take("eager").is_ok()));
        let refused = quota.take("eager").expect_err("one too many");
        assert_eq!(refused.code(), Code::ResourceExhausted);
        let details = refused.get_error_details();
        assert_eq!(details.error_info().expect("a reason").reason, reason::QUOTA_EXCEEDED);
        let wait = details.retry_info().and_then(|info| info.retry_delay).expect("a pause");
        assert!(wait <= Duration::from_millis(334), "{wait:?}");
        assert!(quota.take("other").is_ok());
    }

    #[test]
    fn made_up_tenants_share_a_bucket_beyond_a_number() {
        let quota = TenantQuota::new(NonZeroU32::new(1).expect("not zero"));
        let refused =
            (0..TENANTS_MAX + 1_000).filter(|number| quota.take(&format!("tenant-{number}")).is_err()).count();
        // The last ones share a bucket of one call a second.
        assert!(refused > 900, "{refused}");
    }
}
