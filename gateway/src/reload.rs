//! Reads secrets from files again when they change (G3, W5).

use std::{convert::Infallible, error::Error as StdError, future::pending, sync::Arc, time::Duration};

use oncegate_runtime::secret::{ReadError, Secret};
use tokio::time::{MissedTickBehavior, interval};

use crate::route::Route;

/// Looks at the files of `routes` every `pause`, for ever. A path is opened anew each time, since Kubernetes swaps a
/// symbolic link. Content is compared and not times, which such a swap does not move reliably. A file that cannot be read,
/// or is blank, leaves the old secrets in place and is reported once until it is mended.
pub(crate) async fn watch(routes: &[Arc<Route>], pause: Duration) -> Infallible {
    let mut files: Vec<Watched> = routes
        .iter()
        .filter(|route| route.secrets.path().is_some())
        .map(|route| Watched { route: route.clone(), current: None, reported: false })
        .collect();
    if files.is_empty() {
        return pending().await;
    }
    let mut ticks = interval(pause);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        for file in &mut files {
            let source = file.route.secrets.clone();
            // A hanging network file system must not hold up requests.
            if let Ok(read) = tokio::task::spawn_blocking(move || source.read_list()).await {
                file.update(read);
            }
        }
    }
}

struct Watched {
    route: Arc<Route>,
    current: Option<Vec<Secret>>,
    reported: bool,
}

impl Watched {
    fn update(&mut self, read: Result<Vec<Secret>, ReadError>) {
        let provider = self.route.provider.name();
        match read {
            Ok(secrets) => {
                self.reported = false;
                if self.current.as_ref() == Some(&secrets) {
                    return;
                }
                self.route.provider.replace_secrets(&secrets);
                if self.current.replace(secrets).is_some() {
                    tracing::info!(provider, "secrets were replaced from their file");
                }
            }
            Err(error) if !self.reported => {
                self.reported = true;
                tracing::error!(
                    provider,
                    error = &error as &dyn StdError,
                    "secrets cannot be read again, keeping the old ones"
                );
            }
            Err(_) => {}
        }
    }
}
