//! Kubernetes: an extended resource of the node, and the status of a `HostMemory` object with the node's name.
//!
//! Both are updated by merge patches of a status subresource. A merge patch contains only new values, so repeating it
//! has no further effect. The kubelet copies an extended resource from the node's capacity to its allocatable resources
//! (<https://kubernetes.io/docs/tasks/administer-cluster/extended-resource-node/>); the adapter never changes the
//! node's `memory` resource.

use serde_json::{Value, json};

use crate::http::{Answer, Http, HttpError, Service, TokenHeader};
use crate::offer::Offer;
use crate::time::rfc3339;

/// The custom resource, as `fleet/kubernetes/crd.yaml` defines it.
const API_VERSION: &str = "ch-fleet.dev/v1alpha1";
const KIND: &str = "HostMemory";
const HOST_MEMORIES: &str = "/apis/ch-fleet.dev/v1alpha1/hostmemories";
/// Number of attempts if other clients make conflicting changes.
const ATTEMPTS: u32 = 5;
const CONFLICT: u16 = 409;
/// Statuses of objects that do not exist or no longer exist.
const ABSENT: [u16; 2] = [404, 410];

const MERGE_PATCH: [(&str, &str); 1] = [("Content-Type", "application/merge-patch+json")];
const JSON: [(&str, &str); 1] = [("Content-Type", "application/json")];

/// One node.
#[derive(Debug)]
pub(crate) struct Kubernetes {
    http: Http,
    node: String,
    resource: String,
}

impl Kubernetes {
    pub(crate) fn new(service: &Service, node: &str, resource: &str) -> Result<Self, HttpError> {
        Ok(Self {
            http: Http::new(service, TokenHeader("Authorization", "Bearer "))?,
            node: node.to_owned(),
            resource: resource.to_owned(),
        })
    }

    pub(crate) fn publish(&self, offer: &Offer) -> Result<(), HttpError> {
        let node = self.publish_node(offer)?;
        self.publish_host_memory(offer, &node)
    }

    /// Sets the extended resource and returns the updated node.
    fn publish_node(&self, offer: &Offer) -> Result<Value, HttpError> {
        let path = format!("/api/v1/nodes/{}/status", self.node);
        let capacity = json!({ self.resource.as_str(): offer.capacity_mib().to_string() });
        let patch = json!({"status": {"capacity": capacity}});
        self.patched(&path, &patch)?.good()
    }

    fn publish_host_memory(&self, offer: &Offer, node: &Value) -> Result<(), HttpError> {
        let path = format!("{HOST_MEMORIES}/{}/status", self.node);
        let patch = json!({"status": status(offer)});
        let answer = self.patched(&path, &patch)?;
        if ABSENT.contains(&answer.status) {
            self.create(node)?;
            self.patched(&path, &patch)?.good()?;
        } else {
            answer.good()?;
        }
        Ok(())
    }

    /// Creates the object. Its owner is the node, so Kubernetes deletes it together with the node.
    fn create(&self, node: &Value) -> Result<(), HttpError> {
        let mut object = json!({
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": {"name": self.node},
        });
        if let Some(uid) = node["metadata"]["uid"].as_str() {
            object["metadata"]["ownerReferences"] = json!([{
                "apiVersion": "v1", "kind": "Node", "name": self.node, "uid": uid,
            }]);
        }
        let answer = self
            .http
            .send("POST", HOST_MEMORIES, &JSON, Some(&object))?;
        match answer.status {
            // Another client has already created it.
            CONFLICT => Ok(()),
            404 => Err(HttpError::Missing(format!(
                "the cluster does not define {KIND} of {API_VERSION}: apply crd.yaml"
            ))),
            _ => answer.good().map(drop),
        }
    }

    /// Sends a patch and retries it after a conflict. The server itself also gives up after some attempts.
    fn patched(&self, path: &str, patch: &Value) -> Result<Answer, HttpError> {
        for _ in 0..ATTEMPTS {
            let answer = self.http.send("PATCH", path, &MERGE_PATCH, Some(patch))?;
            if answer.status != CONFLICT {
                return Ok(answer);
            }
        }
        Err(HttpError::Contended {
            path: path.to_owned(),
            attempts: ATTEMPTS,
        })
    }
}

fn status(offer: &Offer) -> Value {
    let ledger = &offer.ledger;
    json!({
        "state": offer.state.name(),
        "observedAt": rfc3339(offer.unix_ms),
        "agentVersion": offer.agent_version,
        "vms": offer.vms,
        "capacityMiB": offer.capacity_mib(),
        "inUseMiB": offer.in_use_mib,
        "freeMiB": offer.free_mib,
        "usableBytes": ledger.usable,
        "availableBytes": ledger.available,
        "residentBytes": ledger.resident,
        "balloonedBytes": ledger.ballooned,
        "callableBytes": ledger.callable_liability,
    })
}

#[cfg(test)]
mod tests;
