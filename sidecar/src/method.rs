//! What a call is for: one list shared by access control, the log and the metrics.

use oncegate_api::v1::idempotency_service_server::SERVICE_NAME;
use oncegate_runtime::{labels, metrics::Label};

labels! {
    /// The methods of the API.
    pub enum Method {
        /// An event is to be processed.
        CheckAndLock => "CheckAndLock",
        /// A lock is to last longer.
        ExtendLock => "ExtendLock",
        /// An attempt succeeded.
        MarkCompleted => "MarkCompleted",
        /// An attempt failed.
        MarkFailed => "MarkFailed",
        /// What happened.
        History => "History",
        /// A person decides.
        Resolve => "Resolve",
        /// How many.
        Stats => "Stats",
        /// Old events are to be deleted.
        Cleanup => "Cleanup",
    }
}

/// What is called: a method of the API, or something served beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Called {
    /// The API.
    Api(Method),
    /// `grpc.health.v1`.
    Health,
    /// What the service consists of.
    Reflection,
    /// Nothing that is known here.
    Unknown,
}

impl Called {
    /// What the path of a request names.
    #[must_use]
    pub fn of(path: &str) -> Called {
        let Some((service, method)) = path.strip_prefix('/').and_then(|path| path.split_once('/')) else {
            return Called::Unknown;
        };
        match service {
            SERVICE_NAME => {
                let known = Method::ALL.iter().find(|known| known.name() == method);
                known.map_or(Called::Unknown, |known| Called::Api(*known))
            }
            "grpc.health.v1.Health" => Called::Health,
            "grpc.reflection.v1.ServerReflection" | "grpc.reflection.v1alpha.ServerReflection" => Called::Reflection,
            _ => Called::Unknown,
        }
    }

    /// For logs and metrics, which only distinguish the methods of the API.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Called::Api(method) => method.name(),
            Called::Health | Called::Reflection | Called::Unknown => OTHER,
        }
    }
}

/// Health, reflection, and what does not exist.
const OTHER: &str = "other";

impl Label for Called {
    const COUNT: usize = Method::COUNT + 1;

    fn index(self) -> usize {
        match self {
            Called::Api(method) => method.index(),
            Called::Health | Called::Reflection | Called::Unknown => Method::COUNT,
        }
    }

    fn values(index: usize, add: &mut dyn FnMut(&'static str)) {
        add(Method::ALL.get(index).map_or(OTHER, |method| method.name()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A method added to the contract has to be permitted to a role, or nobody may call it.
    #[test]
    fn every_method_of_the_contract_is_known() {
        let contract = include_str!("../../proto/oncegate/v1/idempotency.proto");
        let methods: Vec<&str> =
            contract.lines().filter_map(|line| line.trim().strip_prefix("rpc ")?.split('(').next()).collect();
        assert_eq!(methods, Method::ALL.iter().map(|method| method.name()).collect::<Vec<_>>());
        for method in Method::ALL {
            assert_eq!(format!("{method:?}"), method.name());
            assert_eq!(Called::of(&format!("/{SERVICE_NAME}/{}", method.name())), Called::Api(*method));
        }
    }

    #[test]
    fn what_is_not_of_the_contract_is_unknown_and_has_one_name() {
        for path in [
            "",
            "/",
            "/other",
            "/oncegate.v1.IdempotencyService",
            "/oncegate.v1.IdempotencyService/",
            "/oncegate.v1.IdempotencyService/Drop",
            "/oncegate.v1.IdempotencyService/other",
            "/oncegate.v1.IdempotencyService/CheckAndLock/",
            "oncegate.v1.IdempotencyService/CheckAndLock",
            "/x/CheckAndLock",
            "/grpc.health.v1.Healthy/Check",
        ] {
            assert_eq!(Called::of(path), Called::Unknown, "{path}");
        }
        assert_eq!(Called::of("/grpc.health.v1.Health/Check"), Called::Health);
        for version in ["v1", "v1alpha"] {
            let path = format!("/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo");
            assert_eq!(Called::of(&path), Called::Reflection);
        }
        for called in [Called::Health, Called::Reflection, Called::Unknown] {
            let mut labels = Vec::new();
            Called::values(called.index(), &mut |label| labels.push(label));
            assert_eq!((called.name(), labels), ("other", vec!["other"]));
        }
        assert!(Method::ALL.iter().all(|method| Called::Api(*method).index() < Called::Health.index()));
    }
}
